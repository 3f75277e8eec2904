//! Recipes on the golden models, and an observer that keeps what it is told.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use espalier_adapters::formats::safetensors::{self, TensorFile};
use espalier_train::recipe::values::{DataList, DataSource};
use espalier_train::run::metrics::{EvalRecord, StepRecord};
use espalier_train::session::{self, SessionOptions, SessionOutcome};
use espalier_train::trainer::Scope;
use espalier_train::{Observer, Recipe, Result, Run};

pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden")
}

pub(crate) fn family(name: &str) -> String {
    golden().join("families").join(name).display().to_string()
}

pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    TensorFile::open(path).unwrap().load_all(&Device::Cpu).unwrap()
}

pub(crate) fn data(path: impl AsRef<Path>) -> DataList {
    DataList(vec![DataSource { path: path.as_ref().display().to_string(), weight: None }])
}

pub(crate) fn source(path: impl AsRef<Path>, weight: f64) -> DataSource {
    DataSource { path: path.as_ref().display().to_string(), weight: Some(weight) }
}

/// Pre-tokenised rows of unequal lengths (5 to 16), made by a fixed formula; the first two labels are masked.
pub(crate) fn write_rows(path: &Path, count: usize) {
    let mut text = String::new();
    for i in 0..count {
        let ids: Vec<usize> = (0..5 + (i * 7) % 12).map(|j| 3 + (i * 31 + j * j * 5 + j * 17) % 60).collect();
        let labels: Vec<i64> = ids.iter().enumerate().map(|(j, id)| if j < 2 { -100 } else { *id as i64 }).collect();
        writeln!(text, "{{\"input_ids\": {ids:?}, \"labels\": {labels:?}}}").unwrap();
    }
    std::fs::write(path, text).unwrap();
}

/// A LoRA on the golden Llama, without shuffling.
pub(crate) fn recipe(rows: &Path, out: &Path) -> Recipe {
    Recipe {
        model: family("llama_gqa_tied"),
        device: "cpu".into(),
        dtype: "f32".into(),
        data: data(rows),
        batch_size: 2,
        shuffle: false,
        lr: 5e-3,
        schedule: "constant".into(),
        max_steps: Some(12),
        out: out.display().to_string(),
        adapter: lora(4, 0.0),
        ..Recipe::default()
    }
}

pub(crate) fn lora(r: i64, dropout: f64) -> toml::Table {
    let mut table = toml::Table::new();
    table.insert("method".into(), "lora".into());
    table.insert("r".into(), r.into());
    table.insert("dropout".into(), dropout.into());
    table
}

/// Keeps all records; sets the stop flag after a step.
#[derive(Default)]
pub(crate) struct Watcher<'a> {
    pub(crate) steps: Vec<StepRecord>,
    pub(crate) evaluations: Vec<EvalRecord>,
    pub(crate) notices: Vec<String>,
    pub(crate) stop_after: Option<(u64, &'a AtomicBool)>,
}

impl Watcher<'_> {
    pub(crate) fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|r| r.loss).collect()
    }
}

impl Observer for Watcher<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.steps.push(record.clone());
        if let Some((step, flag)) = self.stop_after
            && record.step >= step
        {
            flag.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn evaluation(&mut self, record: &EvalRecord) -> Result<()> {
        self.evaluations.push(record.clone());
        Ok(())
    }

    fn notice(&mut self, text: &str) {
        self.notices.push(text.to_owned());
    }
}

/// Trains without a folder; gives the run and what was seen.
pub(crate) fn train(recipe: Recipe) -> (Run, Watcher<'static>) {
    let mut run = Run::prepare(recipe).unwrap();
    let mut watcher = Watcher::default();
    run.train(None, false, &mut watcher, &AtomicBool::new(false)).unwrap();
    (run, watcher)
}

/// Runs a recipe in its folder, up to `stop_after` steps.
pub(crate) fn session(recipe: &Recipe, resume: bool, stop_after: Option<u64>) -> Result<SessionOutcome> {
    let flag = AtomicBool::new(false);
    let mut watcher = Watcher { stop_after: stop_after.map(|step| (step, &flag)), ..Watcher::default() };
    session_with(recipe, resume, &mut watcher, &flag)
}

pub(crate) fn session_with(
    recipe: &Recipe,
    resume: bool,
    observer: &mut dyn Observer,
    flag: &AtomicBool,
) -> Result<SessionOutcome> {
    let mut run = Run::prepare(recipe.clone())?;
    let plan = run.plan(0)?;
    let options = SessionOptions {
        scope: Scope::Adapter,
        resume,
        overwrite: false,
        allow_memory: false,
        command: "espalier train".to_owned(),
    };
    session::run(&mut run, &plan, &options, observer, flag)
}

/// Writes tensors to a file.
pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let entries = tensors.iter().map(|(name, t)| safetensors::Entry::of(name.clone(), t)).collect();
    safetensors::write(path, entries, &BTreeMap::new()).unwrap();
}
