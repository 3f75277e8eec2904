//! The whole way on the embedded model: teach it a skill that it lacks, and check every step of it.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use candle_core::DType;
use espalier_adapters::formats::folder;
use espalier_data::synthetic::{self, Generator, QUICKSTART_SKILL, Split};
use espalier_data::{Message, Row};
use espalier_infer::{GenerateOptions, end_ids, eval};
use espalier_models::{LoadOptions, Model};
use serde::Serialize;

use crate::merge::{self, WriteOptions};
use crate::observer::Observer;
use crate::recipe::values::{DataList, DataSource};
use crate::run::report::{Report, Sample, curves};
use crate::session::{self, SessionOptions};
use crate::trainer::{Run, Scope};
use crate::verify::Probe;
use crate::{Error, Recipe, Result, run::metrics};

/// What the quickstart found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quickstart {
    /// The skill.
    pub skill: String,
    /// Exact match on unseen inputs before training.
    pub accuracy_before: f64,
    /// The same after.
    pub accuracy_after: f64,
    /// The same with the adapter merged into the base and the model read back from its folder.
    pub accuracy_merged: f64,
    /// Unseen inputs.
    pub test_rows: usize,
    /// Steps of training.
    pub steps: usize,
    /// Largest difference of scores between adapted and merged model.
    pub merged_difference: f64,
    /// Whether the adapter's files, read back, give the answers of the run.
    pub reload_agrees: bool,
    /// Seconds altogether.
    pub seconds: f64,
    /// The adapter, as a PEFT folder.
    pub adapter: PathBuf,
    /// The merged model.
    pub merged: PathBuf,
    /// The report.
    pub report: PathBuf,
}

/// How large the demonstration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Training rows.
    pub rows: usize,
    /// Unseen rows.
    pub test_rows: usize,
    /// Steps.
    pub steps: usize,
}

impl Default for Size {
    fn default() -> Self {
        Self { rows: 3840, test_rows: 100, steps: 240 }
    }
}

/// The recipe of the demonstration.
pub fn recipe(data: &Path, out: &Path, steps: usize) -> Recipe {
    let mut adapter = toml::Table::new();
    adapter.insert("method".into(), "lora".into());
    adapter.insert("r".into(), 8.into());
    adapter.insert("alpha".into(), 16.0.into());
    Recipe {
        data: DataList(vec![DataSource { path: data.display().to_string(), weight: None }]),
        batch_size: 16,
        max_steps: Some(steps),
        lr: 5e-3,
        schedule: "linear".into(),
        warmup_steps: Some(steps / 20),
        max_length: 256,
        seed: 7,
        out: out.display().to_string(),
        adapter,
        ..Recipe::default()
    }
}

fn test_rows(count: usize) -> Result<Vec<Row>> {
    let generator = Generator::of(QUICKSTART_SKILL, 1, Split::Test);
    (0..count as u64)
        .map(|i| {
            let sample = generator.sample(i);
            match (sample.messages, sample.prompt, sample.answer) {
                (Some(messages), ..) => Ok(Row::Messages {
                    messages: messages.into_iter().map(|(role, content)| Message::new(role, content)).collect(),
                    tools: None,
                }),
                (None, Some(prompt), Some(answer)) => Ok(Row::PromptCompletion { prompt, completion: answer }),
                _ => Err(Error::recipe("quickstart", "a sample without an answer")),
            }
        })
        .collect()
}

fn score(model: &Model, run: &Run, rows: &[Row]) -> Result<eval::ExactMatch> {
    let options = GenerateOptions {
        max_new_tokens: 64,
        eos: end_ids(model, &run.codec),
        batch_size: rows.len().max(1),
        ..GenerateOptions::default()
    };
    Ok(eval::exact_match(model, &run.codec, rows, &options, &mut |_, _| {})?)
}

/// Runs the demonstration in `out` (what an earlier one left there is replaced).
///
/// # Errors
/// If any step fails, or a check does not hold.
pub fn quickstart(
    out: &Path,
    size: Size,
    say: &mut dyn FnMut(&str),
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Quickstart> {
    let began = Instant::now();
    std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
    let data = out.join("train.jsonl");
    synthetic::write_corpus(&data, size.rows as u64, 1, Split::Train, QUICKSTART_SKILL)
        .map_err(|e| Error::io(&data, e))?;
    let mut run = Run::prepare(recipe(&data, out, size.steps))?;
    let plan = run.plan(0)?;
    let rows = test_rows(size.test_rows)?;
    say(&format!(
        "1/5 asking the base model {} unseen questions of the skill `{}`",
        rows.len(),
        QUICKSTART_SKILL.name()
    ));
    run.adapters.disable(&mut run.model)?;
    let before = score(&run.model, &run, &rows)?;
    run.adapters.activate(&mut run.model, &[(&run.name, 1.0)])?;
    say(&format!(
        "    {:.0} % right; 2/5 training a LoRA ({} of {} parameters)",
        100.0 * before.accuracy,
        plan.trainable_parameters,
        plan.base_parameters
    ));
    let options = SessionOptions {
        scope: Scope::Adapter,
        resume: false,
        overwrite: true,
        allow_memory: false,
        command: "espalier quickstart".into(),
    };
    let session = session::run(&mut run, &plan, &options, observer, stop)?;
    let adapter = session.adapter.ok_or_else(|| Error::run(out, "no adapter was written"))?;
    say("3/5 asking again with the adapter");
    let after = score(&run.model, &run, &rows)?;
    say(&format!("    {:.0} % right; 4/5 reading the adapter back from its files", 100.0 * after.accuracy));
    let (path, load) = (run.model.provenance().path().map(Path::to_owned).unwrap_or_default(), LoadOptions::cpu());
    let mut fresh =
        Model::load(&path, &LoadOptions { dtype: run.model.dtype(), device: run.model.device().clone(), ..load })?;
    let device = fresh.device().clone();
    let attached = folder::load(&mut fresh, folder::read(&adapter)?, false, DType::F32, &device)?;
    let mut adapters = espalier_adapters::AdapterSet::new();
    adapters.add("saved", attached)?;
    adapters.activate(&mut fresh, &[("saved", 1.0)])?;
    let few = &rows[..rows.len().min(16)];
    let answers = |e: &eval::ExactMatch| e.pairs.iter().map(|p| p.answer.clone()).collect::<Vec<_>>();
    let reload_agrees = answers(&score(&fresh, &run, few)?) == answers(&score(&run.model, &run, few)?);
    say("5/5 merging the adapter into the base, saving, and asking the saved model");
    let merged_path = out.join("merged");
    let probe = Probe::made(&fresh, &run.codec, &adapters)?;
    let options = WriteOptions {
        base: run.recipe.model.clone(),
        command: "espalier quickstart".into(),
        ..WriteOptions::new(&fresh)
    };
    let merged = merge::merge_into_folder(&mut fresh, &mut adapters, &merged_path, &options, &probe)?;
    let options = LoadOptions { dtype: fresh.dtype(), device, ..LoadOptions::cpu() };
    let saved = Model::load(&merged_path, &options)?;
    let accuracy_merged = score(&saved, &run, &rows)?.accuracy;
    let result = Quickstart {
        skill: QUICKSTART_SKILL.name().to_owned(),
        accuracy_before: before.accuracy,
        accuracy_after: after.accuracy,
        accuracy_merged,
        test_rows: rows.len(),
        steps: session.outcome.steps,
        merged_difference: merged.written.comparison.max_difference,
        reload_agrees,
        seconds: began.elapsed().as_secs_f64(),
        adapter,
        merged: merged_path,
        report: session.report.clone(),
    };
    write_report(&result, &before, &after, out)?;
    if !reload_agrees {
        return Err(Error::run(&result.adapter, "the adapter read back from its files answers differently"));
    }
    Ok(result)
}

fn write_report(result: &Quickstart, before: &eval::ExactMatch, after: &eval::ExactMatch, out: &Path) -> Result<()> {
    let samples = before.pairs.iter().zip(&after.pairs).take(8).map(|(b, a)| Sample {
        prompt: b.prompt.clone(),
        expected: Some(b.expected.clone()),
        before: b.answer.clone(),
        after: a.answer.clone(),
    });
    let percent = |x: f64| format!("{:.0} %", 100.0 * x);
    Report::new("Quickstart")
        .subtitle(format!("A LoRA teaches seedling the skill `{}`", result.skill))
        .highlights([
            ("before", percent(result.accuracy_before), "exact match, unseen inputs"),
            ("after", percent(result.accuracy_after), "with the adapter"),
            ("merged", percent(result.accuracy_merged), "adapter written into the base"),
        ])
        .heading("Answers")
        .samples("Unseen inputs", samples)
        .heading("Curves")
        .charts(curves(&metrics::read(out.join("metrics.jsonl"))?))
        .heading("Facts")
        .facts([
            ("Test rows", result.test_rows.to_string()),
            ("Steps", result.steps.to_string()),
            ("Merged against adapted, largest difference of scores", format!("{:.2e}", result.merged_difference)),
            ("Adapter read back gives the same answers", result.reload_agrees.to_string()),
            ("Seconds", format!("{:.1}", result.seconds)),
        ])
        .code("Command", "espalier quickstart")
        .write(&result.report)?;
    Ok(())
}
