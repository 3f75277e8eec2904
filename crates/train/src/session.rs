//! A run in its folder: recipe, metrics, TensorBoard, checkpoints, report and the adapter or model that comes out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use espalier_adapters::Host;
use espalier_adapters::formats::{atomic, folder, safetensors};
use espalier_data::TEMPLATE_FILE;
use espalier_models::LoadOptions;
use espalier_models::export::copy_companions;
use serde::Serialize;

use crate::checkpoint;
use crate::merge::{self, WriteOptions};
use crate::observer::Observer;
use crate::plan::Plan;
use crate::reload::{self, Reload};
use crate::run::metrics::{self, EvalRecord, MetricsWriter, Record, StepRecord};
use crate::run::model_card::{ModelCard, Score};
use crate::run::report::{Report, curves};
use crate::run::tensorboard::EventWriter;
use crate::run::{RunError, RunFolder};
use crate::trainer::{Outcome, Run, Scope};
use crate::training::Training;
use crate::verify::Probe;
use crate::{Error, Result};

/// How a session is run.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Adapter or whole model.
    pub scope: Scope,
    /// Go on from the newest checkpoint.
    pub resume: bool,
    /// Begin anew in a folder that holds a run.
    pub overwrite: bool,
    /// Run although the estimated memory is more than there is.
    pub allow_memory: bool,
    /// The command, for the report and the model card.
    pub command: String,
}

/// What a session leaves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SessionOutcome {
    /// How the run ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The adapter folder, unless the whole model was trained.
    pub adapter: Option<PathBuf>,
    /// The model folder, if the whole model was trained.
    pub model: Option<PathBuf>,
    /// Tensors written.
    pub tensors: usize,
    /// How what was written, read back from its folder, compares with what was trained.
    pub reload: Option<Reload>,
    /// The report.
    pub report: PathBuf,
    /// The run folder.
    pub folder: PathBuf,
}

/// Keeps the records of a run, and passes everything on.
struct Recorder<'a> {
    metrics: MetricsWriter,
    events: EventWriter,
    inner: &'a mut dyn Observer,
    notices: Vec<String>,
}

impl Observer for Recorder<'_> {
    fn start(&mut self, step: usize, total: usize) {
        self.inner.start(step, total);
    }

    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.metrics.append(&Record::from(record.clone()))?;
        let mut values =
            vec![("train/loss", record.loss), ("train/lr", record.lr), ("train/tokens_per_s", record.tokens_per_s)];
        values.extend(record.grad_norm.map(|norm| ("train/grad_norm", norm)));
        values.extend(record.memory_bytes.map(|bytes| ("train/memory_bytes", bytes as f64)));
        self.events.scalars(record.step, values)?;
        self.inner.step(record)
    }

    fn evaluation(&mut self, record: &EvalRecord) -> Result<()> {
        self.metrics.append(&Record::from(record.clone()))?;
        self.events.scalars(record.step, [("eval/loss", record.eval_loss)])?;
        self.inner.evaluation(record)
    }

    fn checkpoint(&mut self, path: &Path) {
        self.inner.checkpoint(path);
    }

    fn notice(&mut self, text: &str) {
        self.notices.push(text.to_owned());
        self.inner.notice(text);
    }
}

/// Runs `run` in its folder.
///
/// # Errors
/// If there is too little memory, the folder holds another run, or the run cannot go on from it (nothing is written then);
/// if the run fails, a file cannot be written, or the adapter read back differs from the trained one.
pub fn run(
    run: &mut Run,
    plan: &Plan,
    options: &SessionOptions,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<SessionOutcome> {
    let files = RunFolder::new(&run.recipe.out);
    let checkpoints = files.checkpoints();
    let recipe = run.recipe.to_toml()?;
    let moves_base = run.dynamics()?.moves_base();
    // Whatever can be refused is refused before anything is written.
    if !options.allow_memory {
        plan.memory.check()?;
    }
    let starts = run.starts.clone();
    let training = Training::new(run, Some(&checkpoints), options.resume)?;
    let step = training.state.step as u64;
    if options.resume || options.overwrite {
        atomic::recover(&checkpoints)?;
        atomic::recover(&files.adapter())?;
        for path in [files.recipe(), files.metrics(), files.report(), files.root().join(MODEL)] {
            atomic::recover_of(files.root(), path.file_name().and_then(|name| name.to_str()))?;
        }
    }
    if options.overwrite && !options.resume {
        clear(&files)?;
    }
    if !options.resume && !checkpoint::list(&checkpoints).is_empty() {
        return Err(holds_a_run(&files));
    }
    files.create()?;
    let metrics = if options.resume {
        MetricsWriter::resume(files.metrics(), step)?.0
    } else {
        MetricsWriter::create(files.metrics()).map_err(|e| match e {
            RunError::Exists { .. } => holds_a_run(&files),
            other => other.into(),
        })?
    };
    let events = match options.resume {
        true => EventWriter::resume(files.root(), step)?,
        false => EventWriter::create(files.root())?,
    };
    let kept = options.resume && files.starts().is_file();
    if !starts.is_empty() && !kept {
        let entries = starts.iter().map(|(name, start)| safetensors::Entry::of(name.clone(), start)).collect();
        safetensors::write(&files.starts(), entries, &BTreeMap::new())?;
    }
    atomic::write(&files.recipe(), |out| out.write_all(recipe.as_bytes()))?;
    let mut recorder = Recorder { metrics, events, inner: observer, notices: Vec::new() };
    let outcome = training.run(&mut recorder, stop)?;
    recorder.metrics.sync()?;
    let notices = recorder.notices;
    let (adapter, model, tensors, reload) = match options.scope {
        // An adapter says nothing without the base it was trained on: where that changed, the model is the result.
        Scope::Adapter if !moves_base => {
            let (path, tensors, reload) = write_adapter(run, &files, &outcome, plan, &recipe, &options.command)?;
            (Some(path), None, tensors, Some(reload))
        }
        Scope::Adapter | Scope::WholeModel => {
            let (path, tensors, reload) = write_model(run, &files)?;
            (None, Some(path), tensors, Some(reload))
        }
    };
    let (report, folder) = (files.report(), files.root().to_owned());
    let ended = SessionOutcome { outcome, adapter, model, tensors, reload, report, folder };
    write_report(run, &files, &ended, plan, &recipe, &options.command, &notices)?;
    Ok(ended)
}

/// What was read back, in words.
fn read_back(ended: &SessionOutcome) -> &'static str {
    if ended.model.is_some() { "Model read back" } else { "Adapter read back" }
}

/// Name of the folder of a model trained whole.
const MODEL: &str = "model";

fn holds_a_run(files: &RunFolder) -> Error {
    Error::run(
        files.root(),
        "the folder holds a run already; go on with --resume, begin anew with --overwrite, or choose another --out",
    )
}

/// Removes what an earlier run left in the folder, and nothing else: its results first, so that none of them is ever found
/// beside another recipe.
fn clear(files: &RunFolder) -> Result<()> {
    let remove_file = |path: PathBuf| match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    };
    let (adapter, model) = (files.adapter(), files.root().join(MODEL));
    for name in [folder::CONFIG_FILE, folder::WEIGHTS_FILE, "README.md"] {
        remove_file(adapter.join(name))?;
    }
    let entries = std::fs::read_dir(&model).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_model = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
    };
    entries.filter(is_model).try_for_each(remove_file)?;
    for path in [adapter, model] {
        // Only where nothing else is in it.
        let _ = std::fs::remove_dir(path);
    }
    for file in [files.metrics(), files.report(), files.recipe(), files.starts()] {
        remove_file(file)?;
    }
    for entry in std::fs::read_dir(files.root()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("events.out.tfevents.") {
            remove_file(entry.path())?;
        }
    }
    for (_, path) in checkpoint::list(&files.checkpoints()) {
        atomic::remove_folder(&path)?;
    }
    Ok(())
}

fn write_adapter(
    run: &mut Run,
    files: &RunFolder,
    outcome: &Outcome,
    plan: &Plan,
    recipe: &str,
    command: &str,
) -> Result<(PathBuf, usize, Reload)> {
    let path = files.adapter();
    std::fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
    let saved = run.save_adapter(&path)?;
    // Read back what was written: a file that says something else than the run is no result.
    let reload = reload::check(run, &path)?;
    if let Some(from) = run.model.provenance().path().map(Path::to_owned).filter(|p| p.is_dir()) {
        copy_companions(&from, &path)?;
    }
    write_template(run, &path)?;
    card(run, outcome, plan, recipe, command)?.write(path.join("README.md"))?;
    Ok((path, saved.tensors, reload))
}

/// The chat template that a recipe chose goes with what was trained by it, in place of the base's.
fn write_template(run: &Run, folder: &Path) -> Result<()> {
    if let (Some(_), Some(template)) = (&run.recipe.chat_template, run.codec.template()) {
        atomic::write(&folder.join(TEMPLATE_FILE), |out| out.write_all(template.source().as_bytes()))?;
    }
    Ok(())
}

fn write_model(run: &mut Run, files: &RunFolder) -> Result<(PathBuf, usize, Reload)> {
    let path = files.root().join(MODEL);
    let load = LoadOptions { dtype: run.model.dtype(), device: run.model.device().clone(), ..LoadOptions::cpu() };
    let options =
        WriteOptions { tokenizer: run.recipe.tokenizer.as_ref().map(PathBuf::from), ..WriteOptions::new(&load) };
    let trained = run.adapters.get(&run.name)?.rows.iter().flat_map(|(_, rows)| rows.indices.clone());
    let probe = Probe::made(run.model.config(), &run.codec, &trained.collect::<Vec<_>>())?;
    // Read back before it takes its place: a model that says something else than the run is no result.
    let written = merge::model_verified(&mut run.model, &path, &options, &probe)?;
    write_template(run, &path)?;
    let (max_difference, limit) = (written.comparison.max_difference, written.limit);
    Ok((path, written.tensors, Reload { probe_tokens: probe.tokens(), max_difference, limit }))
}

fn counts(plan: &Plan) -> Vec<(String, String)> {
    plan.data
        .iter()
        .map(|source| {
            let r = &source.report;
            let refused: u64 = r.refused.values().sum();
            let text = format!(
                "{} rows, {} used, {refused} refused, {} cut; {} tokens, {} trained",
                r.rows, r.used, r.truncated, r.tokens, r.trained_tokens
            );
            (source.path.clone(), text)
        })
        .collect()
}

fn facts(outcome: &Outcome, plan: &Plan) -> Vec<(String, String)> {
    let mut facts = vec![
        ("Method".to_owned(), plan.method.clone()),
        ("Dynamics".to_owned(), plan.dynamics.to_owned()),
        ("Adapted modules".to_owned(), plan.sites.len().to_string()),
        ("Trainable parameters".to_owned(), format!("{} of {}", plan.trainable_parameters, plan.base_parameters)),
        ("Steps".to_owned(), outcome.steps.to_string()),
        ("Tokens seen".to_owned(), format!("{} ({} with a target)", outcome.tokens, outcome.trained_tokens)),
        ("Last training loss".to_owned(), format!("{:.4}", outcome.loss)),
        ("Tokens a second".to_owned(), format!("{:.0}", outcome.tokens_per_s)),
        ("Training time".to_owned(), format!("{:.1} s", outcome.seconds)),
        ("Device".to_owned(), format!("{} ({})", plan.device, plan.dtype)),
    ];
    if let Some(live) = &outcome.live {
        facts.push(("Trained".to_owned(), live.to_string()));
    }
    if let Some((step, loss)) = outcome.best {
        facts.push(("Best evaluation loss".to_owned(), format!("{loss:.4} at step {step}")));
    }
    if let Some(bytes) = outcome.peak_memory_bytes {
        let estimate = plan.memory.total >> 20;
        facts.push(("Peak memory".to_owned(), format!("{} MiB (estimated before: {estimate} MiB)", bytes >> 20)));
    }
    facts
}

fn card(run: &Run, outcome: &Outcome, plan: &Plan, recipe: &str, command: &str) -> Result<ModelCard> {
    let attached = run.adapters.get(&run.name)?;
    let classifier = run.model.config().labels().is_some();
    let scores = outcome.best.map(|(step, loss)| Score {
        name: "loss".into(),
        data: format!("evaluation rows, step {step}"),
        before: "-".into(),
        after: format!("{loss:.4}"),
    });
    let name = run.model.provenance().path().map(|p| p.display().to_string()).unwrap_or_default();
    Ok(ModelCard {
        title: Path::new(&run.recipe.out).file_name().map_or("adapter".into(), |n| n.to_string_lossy().into_owned()),
        base_model: if run.recipe.model.is_empty() { name } else { run.recipe.model.clone() },
        base_hash: run.model.base_hash()?,
        method: plan.method.clone(),
        library_name: if attached.config.method.to_peft().is_some() { "peft".into() } else { "espalier".into() },
        pipeline_tag: if classifier { "text-classification".into() } else { "text-generation".into() },
        tags: run.recipe.tags.0.clone(),
        facts: facts(outcome, plan),
        data: counts(plan),
        scores: scores.into_iter().collect(),
        recipe: recipe.to_owned(),
        command: command.to_owned(),
        ..ModelCard::default()
    })
}

fn write_report(
    run: &Run,
    files: &RunFolder,
    ended: &SessionOutcome,
    plan: &Plan,
    recipe: &str,
    command: &str,
    notices: &[String],
) -> Result<()> {
    let outcome = &ended.outcome;
    let records = metrics::read(files.metrics())?;
    let title = files.root().file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned());
    let how = match (outcome.stopped, outcome.early_stopped) {
        (true, _) => "stopped before its end",
        (_, true) => "ended early: the evaluation got no better",
        _ => "finished",
    };
    let mut page = Report::new(title)
        .subtitle(format!("{} on {} ({}), {how}", plan.method, plan.family, run.objective.name()))
        .highlights([
            ("loss", format!("{:.4}", outcome.loss), "last training step"),
            ("steps", outcome.steps.to_string(), ""),
            ("tokens/s", format!("{:.0}", outcome.tokens_per_s), ""),
        ]);
    for notice in notices {
        page = page.notice(notice.clone());
    }
    page = page.heading("Curves").charts(curves(&records)).heading("Run").facts(facts(outcome, plan));
    page = page.facts(ended.reload.iter().map(|reload| (read_back(ended), reload.to_string())));
    page = page.heading("Data").facts(counts(plan));
    page = page.heading("Sites").table(
        "Adapted modules",
        ["module", "rank", "alpha", "parameters"],
        plan.sites
            .iter()
            .map(|s| vec![s.path.clone(), s.rank.to_string(), s.alpha.to_string(), s.parameters.to_string()]),
    );
    page = page.heading("Recipe").code("Command", command).code("recipe.toml", recipe);
    page.write(files.report())?;
    Ok(())
}
