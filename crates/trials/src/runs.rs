//! Runs to try: small recipes of every objective, and what a run leaves that must not depend on how it came about.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use candle_core::Device;
use espalier_adapters::MethodConfig;
use espalier_adapters::adapter::Property;
use espalier_adapters::formats::folder::WEIGHTS_FILE;
use espalier_adapters::formats::safetensors::TensorFile;
use espalier_models::{LoadOptions, Model};
use espalier_train::dynamics::DynamicsConfig;
use espalier_train::plan::Plan;
use espalier_train::recipe::values::{DataList, DataSource};
use espalier_train::run::metrics::{self, Record, StepRecord};
use espalier_train::session::{self, SessionOptions, SessionOutcome};
use espalier_train::trainer::Scope;
use espalier_train::{Observer, Recipe, Run, checkpoint, setup};

use crate::golden::{self, Case};
use crate::root;

/// Pre-tokenised rows of unequal lengths, made by a fixed formula, the first two labels masked.
pub(crate) fn rows(count: usize, longest: usize) -> Result<String> {
    rows_of(0..count, longest, 60)
}

/// Those of a range, of `tokens` tokens from 3 on.
pub(crate) fn rows_of(range: Range<usize>, longest: usize, tokens: usize) -> Result<String> {
    let mut text = String::new();
    for i in range {
        let length = 5 + (i * 7) % (longest - 4);
        let ids: Vec<usize> = (0..length).map(|j| 3 + (i * 31 + j * j * 5 + j * 17) % tokens).collect();
        let labels: Vec<i64> = ids.iter().enumerate().map(|(j, id)| if j < 2 { -100 } else { *id as i64 }).collect();
        writeln!(text, "{{\"input_ids\": {ids:?}, \"labels\": {labels:?}}}")?;
    }
    Ok(text)
}

/// Rows of text with one of two labels, and a tokenizer of their words in `folder`.
pub(crate) fn labelled(folder: &Path, range: Range<usize>) -> Result<String> {
    const WORDS: usize = 40;
    let vocab: serde_json::Map<_, _> = (0..WORDS).map(|i| (format!("w{i}"), i.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    let mut text = String::new();
    for i in range {
        let words: Vec<String> =
            (0..3 + i % 8).map(|j| format!("w{}", (i * 31 + j * j * 5 + j * 17) % WORDS)).collect();
        writeln!(text, "{{\"text\": \"{}\", \"label\": {}}}", words.join(" "), i % 2)?;
    }
    Ok(text)
}

/// The embedded model in `folder`.
fn seedling(folder: &Path) -> Result<String> {
    let folder = folder.join("seedling");
    espalier_models::seedling::write(&folder)?;
    Ok(folder.display().to_string())
}

/// A data file as recipes name it.
pub fn data(path: &Path) -> DataList {
    DataList(vec![DataSource { path: path.display().to_string(), weight: None }])
}

/// The `[adapter]` table of a method.
pub(crate) fn table(method: &MethodConfig) -> Result<toml::Table> {
    Ok(toml::Table::try_from(method)?)
}

/// The example of a method called `wanted`.
pub(crate) fn example(wanted: &str) -> Result<toml::Table> {
    let found = MethodConfig::examples().into_iter().find(|(name, _)| name == wanted);
    table(&found.with_context(|| format!("no example `{wanted}`"))?.1)
}

/// Recipes that save after every step, by name; their rows are written into `folder`. Every dynamics of the list is among them:
/// in each of its examples if `all`, else in its last.
///
/// # Errors
/// If a file cannot be written.
pub fn saving(folder: &Path, all: bool) -> Result<Vec<(String, Recipe)>> {
    let (tokens, classes) = (folder.join("tokens.jsonl"), folder.join("classes.jsonl"));
    let words = folder.join("words");
    std::fs::write(&tokens, rows(14, 16)?)?;
    std::fs::write(&classes, labelled(&words, 0..14)?)?;
    let family = |name: &str| root().join("parity/golden/families").join(name).display().to_string();
    let plain = Recipe {
        model: family("llama_gqa_tied"),
        device: "cpu".into(),
        dtype: "f32".into(),
        data: data(&tokens),
        batch_size: 2,
        shuffle: true,
        seed: 11,
        lr: 5e-3,
        max_steps: Some(8),
        save_every: 1,
        keep_checkpoints: 2,
        adapter: example("lora dropout")?,
        ..Recipe::default()
    };
    let evaluated = Recipe { validation_split: 3.0, eval_every: 2, keep_checkpoints: 1, ..plain.clone() };
    let packed =
        Recipe { packing: true, max_length: 32, accumulation: 2, adapter: example("dora dropout")?, ..plain.clone() };
    let classified = Recipe {
        model: family("bert"),
        tokenizer: Some(words.display().to_string()),
        data: data(&classes),
        ..plain.clone()
    };
    let pretrained = Recipe {
        model: String::new(),
        architecture: Some(format!("{}/config.json", family("llama_gqa_tied"))),
        adapter: toml::Table::new(),
        max_steps: Some(5),
        ..plain.clone()
    };
    let mut cases = vec![
        ("a new model whole".to_owned(), pretrained),
        ("next tokens".to_owned(), plain.clone()),
        ("next tokens, evaluated".to_owned(), evaluated.clone()),
        ("packed, accumulated".to_owned(), packed),
        ("classes".to_owned(), classified),
    ];
    let examples = DynamicsConfig::examples();
    for (i, (name, dynamics, adapter)) in examples.iter().enumerate() {
        let last = examples.get(i + 1).is_none_or(|(_, next, _)| next.name() != dynamics.name());
        if all || last {
            let (adapter, dynamics) = (adapter.parse()?, toml::Table::try_from(dynamics)?);
            cases.push((name.clone(), Recipe { adapter, dynamics, lr: 1e-3, ..evaluated.clone() }));
        }
    }
    Ok(cases)
}

/// Recipes whose bits must not depend on threads, by name: every method in each of its examples. A run is a few steps of
/// the embedded model, large enough for its products to be shared out.
///
/// # Errors
/// If a file cannot be written.
pub fn of_methods(folder: &Path) -> Result<Vec<(String, Recipe)>> {
    let tokens = folder.join("tokens.jsonl");
    std::fs::write(&tokens, rows(16, 64)?)?;
    let model = seedling(folder)?;
    let recipe = |method: &MethodConfig| -> Result<Recipe> {
        Ok(Recipe {
            model: model.clone(),
            device: "cpu".into(),
            dtype: "f32".into(),
            data: data(&tokens),
            batch_size: 2,
            accumulation: 2,
            lr: 1e-3,
            max_steps: Some(2),
            adapter: table(method)?,
            ..Recipe::default()
        })
    };
    MethodConfig::examples().into_iter().map(|(name, method)| Ok((name, recipe(&method)?))).collect()
}

/// Golden models of every family, by name: folders that hold one.
///
/// # Errors
/// If they cannot be listed.
pub fn families() -> Result<Vec<(String, PathBuf)>> {
    let folder = root().join("parity/golden/families");
    let entries = std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut all: Vec<(String, PathBuf)> = entries
        .map(|e| e.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())))
        .collect::<std::io::Result<_>>()?;
    all.retain(|(_, path)| path.join("config.json").is_file());
    all.sort();
    Ok(all)
}

/// A recipe of a few steps on the model in `model`, for what it is made for; its rows are written into `folder`.
///
/// # Errors
/// If the model cannot be loaded, or a file cannot be written.
pub fn on_model(folder: &Path, model: &Path) -> Result<Recipe> {
    let loaded = Model::load(model, &LoadOptions::cpu())?;
    let words = folder.join("words");
    let file = folder.join("rows.jsonl");
    let classes = loaded.config().labels().is_some();
    let longest = loaded.config().max_positions.min(16);
    std::fs::write(&file, if classes { labelled(&words, 0..14)? } else { rows_of(0..14, longest, 40)? })?;
    Ok(Recipe {
        model: model.display().to_string(),
        tokenizer: classes.then(|| words.display().to_string()),
        device: "cpu".into(),
        dtype: "f32".into(),
        data: data(&file),
        batch_size: 2,
        lr: 1e-3,
        max_steps: Some(espalier_train::live::WATCHED),
        ..Recipe::default()
    })
}

/// What rows of tokens are learned for.
pub const NEXT_TOKENS: &str = "next tokens";

/// A method, its example's name, what is learned, and a recipe of fifty steps of eight rows: every method in each of its
/// examples without dropout.
///
/// # Errors
/// If a file cannot be written.
pub fn of_eight(folder: &Path) -> Result<Vec<(&'static str, String, &'static str, Recipe)>> {
    let (tokens, classes, words) = (folder.join("tokens.jsonl"), folder.join("classes.jsonl"), folder.join("words"));
    std::fs::write(&tokens, rows(8, 16)?)?;
    std::fs::write(&classes, labelled(&words, 0..8)?)?;
    let mut all = Vec::new();
    for (name, method) in MethodConfig::examples() {
        let adapter = table(&method)?;
        if adapter.get("dropout").and_then(toml::Value::as_float).is_some_and(|p| p > 0.0) {
            continue;
        }
        let recipe = Recipe {
            model: golden::folder().join("families/llama_gqa_tied").display().to_string(),
            device: "cpu".into(),
            dtype: "f32".into(),
            data: data(&tokens),
            batch_size: 8,
            shuffle: false,
            lr: 1e-3,
            max_steps: Some(50),
            adapter,
            ..Recipe::default()
        };
        let classified = Recipe {
            model: golden::folder().join("families/bert").display().to_string(),
            tokenizer: Some(words.display().to_string()),
            data: data(&classes),
            ..recipe.clone()
        };
        all.push((method.name(), name.clone(), NEXT_TOKENS, recipe));
        if method.exception(Property::Encoders).is_none() {
            all.push((method.name(), name, "classes", classified));
        }
    }
    Ok(all)
}

/// A recipe that goes on from a golden adapter with the rows of a range, whatever its base learns.
///
/// # Errors
/// If a file cannot be written.
pub fn of_rows(case: &Case, folder: &Path, range: Range<usize>) -> Result<Recipe> {
    let (file, words) = (folder.join(format!("rows-{}-{}.jsonl", range.start, range.end)), folder.join("words"));
    let classes = case.labels()?.is_some();
    std::fs::write(&file, if classes { labelled(&words, range)? } else { rows_of(range, 16, 40)? })?;
    Ok(Recipe {
        model: case.base.display().to_string(),
        init_adapter: Some(case.path.display().to_string()),
        tokenizer: classes.then(|| words.display().to_string()),
        device: "cpu".into(),
        dtype: "f32".into(),
        data: data(&file),
        shuffle: false,
        ..Recipe::default()
    })
}

/// Keeps the records of steps.
#[derive(Debug, Default)]
struct Steps(Vec<StepRecord>);

impl Observer for Steps {
    fn step(&mut self, record: &StepRecord) -> espalier_train::Result<()> {
        self.0.push(record.clone());
        Ok(())
    }
}

/// Runs a recipe without a folder; gives the run and its steps.
///
/// # Errors
/// Those of the run.
pub fn train(recipe: Recipe) -> Result<(Run, Vec<StepRecord>)> {
    let (mut run, mut steps) = (Run::prepare(recipe)?, Steps::default());
    run.train(None, false, &mut steps, &AtomicBool::new(false))?;
    Ok((run, steps.0))
}

/// Runs a recipe in its folder.
///
/// # Errors
/// Those of the run.
pub fn session(recipe: &Recipe, resume: bool, observer: &mut dyn Observer) -> espalier_train::Result<SessionOutcome> {
    planned(recipe, resume, observer).map(|(_, outcome)| outcome)
}

/// The run of a recipe, and what it trains.
///
/// # Errors
/// If anything that the recipe names is missing or does not fit.
pub fn prepared(recipe: &Recipe) -> espalier_train::Result<(Run, Scope)> {
    Ok(match recipe.architecture {
        Some(_) => (Run::prepare_whole(recipe.clone(), setup::new_model(recipe)?)?, Scope::WholeModel),
        None => (Run::prepare(recipe.clone())?, Scope::Adapter),
    })
}

/// The same, with what was told of the run before it began.
///
/// # Errors
/// Those of the run.
pub fn planned(
    recipe: &Recipe,
    resume: bool,
    observer: &mut dyn Observer,
) -> espalier_train::Result<(Plan, SessionOutcome)> {
    let (mut run, scope) = prepared(recipe)?;
    let plan = run.plan(0)?;
    let options = SessionOptions { scope, resume, overwrite: false, allow_memory: false, command: "trial".to_owned() };
    let outcome = session::run(&mut run, &plan, &options, observer, &AtomicBool::new(false))?;
    Ok((plan, outcome))
}

/// What a run leaves, times and memory aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The tensors of the adapter, or of the model where that is what was trained.
    result: Vec<u8>,
    /// Step, whether it is an evaluation, bits of the loss and of the gradient's norm.
    records: Vec<(u64, bool, u64, u64)>,
}

impl Trace {
    /// Reads the folder of a finished run.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn of(out: &Path) -> Result<Self> {
        let files = [out.join("adapter").join(WEIGHTS_FILE), out.join("model/model.safetensors")];
        let found = files.iter().find(|f| f.is_file()).with_context(|| format!("{}: no result", out.display()))?;
        let result = std::fs::read(found)?;
        let records = metrics::read(out.join("metrics.jsonl"))?
            .into_iter()
            .map(|record| match record {
                Record::Step(r) => (r.step, false, r.loss.to_bits(), r.grad_norm.unwrap_or(f64::NAN).to_bits()),
                Record::Eval(r) => (r.step, true, r.eval_loss.to_bits(), r.eval_tokens),
            })
            .collect();
        Ok(Self { result, records })
    }
}

/// What is wrong with the checkpoints of a run that ended somewhere: each that is listed must be whole.
pub fn torn(out: &Path) -> Vec<String> {
    let whole = |step: usize, path: &PathBuf| -> Result<()> {
        let state = checkpoint::read_state(path)?;
        anyhow::ensure!(state.step == step, "is of step {}", state.step);
        for file in std::fs::read_dir(path)? {
            let file = file?.path();
            if file.extension().is_some_and(|e| e == "safetensors") {
                TensorFile::open(&file)?.load_all(&Device::Cpu)?;
            }
        }
        Ok(())
    };
    let listed = checkpoint::list(&out.join("checkpoints"));
    listed.iter().filter_map(|(step, path)| whole(*step, path).err().map(|e| format!("step {step}: {e:#}"))).collect()
}

/// Names of the temporary files and folders of a run that ended.
pub fn leftovers(out: &Path) -> Vec<String> {
    [out.to_owned(), out.join("checkpoints"), out.join("adapter"), out.join("model")]
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with('.'))
        .collect()
}
