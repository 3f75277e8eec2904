//! Methods side by side: one budget, one set of rows, a sweep of learning rates for each, and the spread over seeds.
//!
//! The sweep runs with the first seed; the learning rate with the lowest loss on the held-out rows is then run with the others. Every
//! run has a folder of its own and is resumed or passed over when the comparison is started again.

mod report;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use espalier_adapters::formats::{atomic, folder};
use serde::{Deserialize, Serialize};

use crate::observer::Observer;
use crate::recipe::Recipe;
use crate::run::RunFolder;
use crate::run::metrics::{self, EvalRecord, Record, StepRecord};
use crate::session::{self, SessionOptions};
use crate::trainer::{Run, Scope};
use crate::{Error, Result, checkpoint, resident};

/// One of those compared.
#[derive(Debug, Clone)]
pub struct Contender {
    /// Name in tables and folders.
    pub name: String,
    /// What it trains, learning rate and seed aside.
    pub recipe: Recipe,
}

/// When a run of the comparison ends, beside the end of its recipe.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// The steps of the recipe.
    Steps,
    /// Once so many tokens were seen.
    Tokens(u64),
    /// Once so many seconds were spent in steps.
    Seconds(f64),
}

/// What is compared.
#[derive(Debug, Clone)]
pub struct Grid {
    /// Those compared.
    pub contenders: Vec<Contender>,
    /// Learning rates of the sweep, the same for all; none: each recipe's own.
    pub lrs: Vec<f64>,
    /// Seeds; the first is the sweep's.
    pub seeds: Vec<u64>,
    /// When a run ends.
    pub budget: Budget,
    /// Folder of the comparison.
    pub out: PathBuf,
}

/// What came of one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ran {
    /// Which contender.
    pub name: String,
    /// Learning rate.
    pub lr: f64,
    /// Seed.
    pub seed: u64,
    /// Loss on the held-out rows at the end; None where the run failed.
    pub loss: Option<f64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Steps taken.
    pub steps: usize,
    /// Tokens seen.
    pub tokens: u64,
    /// Trainable values.
    pub parameters: usize,
    /// Greatest resident memory of the run, where the system tells.
    pub peak_bytes: Option<u64>,
    /// Tokens a second, the first step left out.
    pub tokens_per_s: f64,
    /// Seconds of training.
    pub seconds: f64,
    /// Bytes of the adapter's file.
    pub adapter_bytes: u64,
    /// Held-out losses on the way: (step, seconds, loss).
    pub curve: Vec<(u64, f64, f64)>,
    /// The recipe it was run with, as TOML.
    pub recipe: String,
}

/// One contender over its seeds at its best learning rate.
#[derive(Debug, Clone, Serialize)]
pub struct Standing {
    /// Its name.
    pub name: String,
    /// The learning rate that the sweep chose.
    pub lr: f64,
    /// Whether that was the least or greatest of several, so that a better one may lie outside.
    pub at_edge: bool,
    /// Mean loss on the held-out rows.
    pub loss: f64,
    /// Sample standard deviation over seeds; None for one seed.
    pub spread: Option<f64>,
    /// Seeds that ended well, and all.
    pub seeds: (usize, usize),
    /// Trainable values.
    pub parameters: usize,
    /// Greatest memory over its seeds.
    pub peak_bytes: Option<u64>,
    /// Mean tokens a second.
    pub tokens_per_s: f64,
    /// Bytes of the adapter's file.
    pub adapter_bytes: u64,
}

/// All of a comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// When runs ended.
    pub budget: Budget,
    /// Lowest loss first; those without a run that ended well are not in it.
    pub standings: Vec<Standing>,
    /// Every run.
    pub runs: Vec<Ran>,
}

/// Is told how a comparison goes.
pub trait Progress {
    /// A run begins: its place, the number of runs as far as known, and its name.
    fn run(&mut self, place: usize, of: usize, name: &str);
    /// Who watches the run itself.
    fn observer(&mut self) -> &mut dyn Observer;
    /// A run ended.
    fn ran(&mut self, ran: &Ran);
}

/// File in a run's folder that says how it ended.
const RESULT: &str = "result.json";

/// Passes records on, and stops a run at the end of its budget.
struct Watch<'a> {
    inner: &'a mut dyn Observer,
    budget: Budget,
    tokens: u64,
    stop: &'a AtomicBool,
}

impl Observer for Watch<'_> {
    fn start(&mut self, step: usize, total: usize) {
        self.inner.start(step, total);
    }

    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.tokens += record.tokens;
        let spent = match self.budget {
            Budget::Steps => false,
            Budget::Tokens(most) => self.tokens >= most,
            Budget::Seconds(most) => record.elapsed_s >= most,
        };
        if spent {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.inner.step(record)
    }

    fn evaluation(&mut self, record: &EvalRecord) -> Result<()> {
        self.inner.evaluation(record)
    }

    fn checkpoint(&mut self, path: &Path) {
        self.inner.checkpoint(path);
    }

    fn notice(&mut self, text: &str) {
        self.inner.notice(text);
    }
}

/// Runs the grid.
///
/// # Errors
/// If nothing is held out, a name comes twice, or a file cannot be written. A run that fails is noted, and the others go on.
pub fn compare(grid: &Grid, progress: &mut dyn Progress, interrupted: &AtomicBool) -> Result<Comparison> {
    check(grid)?;
    let own = grid.lrs.is_empty();
    let sweep = if own { 1 } else { grid.lrs.len() };
    let of = grid.contenders.len() * (sweep + grid.seeds.len() - 1);
    let mut runs: Vec<Ran> = Vec::new();
    let mut one = |contender: &Contender, lr: f64, seed: u64, runs: &mut Vec<Ran>| -> Result<()> {
        progress.run(runs.len() + 1, of, &format!("{} at {lr:e}, seed {seed}", contender.name));
        let ran = run(grid, contender, lr, seed, progress, interrupted)?;
        progress.ran(&ran);
        runs.push(ran);
        Ok(())
    };
    let mut standings = Vec::new();
    for contender in &grid.contenders {
        let lrs = if own { vec![contender.recipe.lr] } else { grid.lrs.clone() };
        let first = runs.len();
        for lr in &lrs {
            one(contender, *lr, grid.seeds[0], &mut runs)?;
        }
        let losses = runs[first..].iter().filter_map(|ran| Some((ran.loss?, ran.lr)));
        let Some((_, best)) = losses.min_by(|a, b| a.0.total_cmp(&b.0)) else { continue };
        for seed in &grid.seeds[1..] {
            one(contender, best, *seed, &mut runs)?;
        }
        standings.extend(standing(&contender.name, best, &lrs, &runs[first..], grid.seeds.len()));
    }
    standings.sort_by(|a, b| a.loss.total_cmp(&b.loss));
    Ok(Comparison { budget: grid.budget, standings, runs })
}

fn check(grid: &Grid) -> Result<()> {
    if grid.contenders.is_empty() || grid.seeds.is_empty() {
        return Err(Error::recipe("compare", "at least one contender and one seed are needed"));
    }
    for (i, contender) in grid.contenders.iter().enumerate() {
        let recipe = &contender.recipe;
        if recipe.eval_data.0.is_empty() && recipe.validation_split == 0.0 {
            let message = format!("{}: nothing is held out; set eval_data or validation_split", contender.name);
            return Err(Error::recipe("eval_data", message));
        }
        if grid.contenders[..i].iter().any(|other| other.name == contender.name) {
            return Err(Error::recipe("compare", format!("two contenders are called `{}`", contender.name)));
        }
    }
    if let Some(lr) = grid.lrs.iter().find(|lr| !(lr.is_finite() && **lr > 0.0)) {
        return Err(Error::recipe("lrs", format!("{lr} is no learning rate")));
    }
    Ok(())
}

fn standing(name: &str, lr: f64, lrs: &[f64], runs: &[Ran], seeds: usize) -> Option<Standing> {
    let kept: Vec<&Ran> = runs.iter().filter(|ran| ran.lr == lr && ran.loss.is_some()).collect();
    let n = kept.len() as f64;
    let loss = kept.iter().filter_map(|ran| ran.loss).sum::<f64>() / n;
    let square = kept.iter().filter_map(|ran| ran.loss).map(|l| (l - loss).powi(2)).sum::<f64>() / (n - 1.0);
    let first = kept.first()?;
    let beyond = |edge: Option<f64>| edge == Some(lr);
    Some(Standing {
        name: name.to_owned(),
        lr,
        at_edge: lrs.len() > 1
            && (beyond(lrs.iter().copied().reduce(f64::min)) || beyond(lrs.iter().copied().reduce(f64::max))),
        loss,
        spread: (kept.len() > 1).then(|| square.sqrt()),
        seeds: (kept.len(), seeds),
        parameters: first.parameters,
        peak_bytes: kept.iter().filter_map(|ran| ran.peak_bytes).max(),
        tokens_per_s: kept.iter().map(|ran| ran.tokens_per_s).sum::<f64>() / n,
        adapter_bytes: first.adapter_bytes,
    })
}

/// One run, or what is left of it from an earlier start.
fn run(
    grid: &Grid,
    contender: &Contender,
    lr: f64,
    seed: u64,
    progress: &mut dyn Progress,
    interrupted: &AtomicBool,
) -> Result<Ran> {
    let out = grid.out.join("runs").join(&contender.name).join(format!("lr-{lr:e}-seed-{seed}"));
    let recipe = Recipe { lr, seed, out: out.display().to_string(), ..contender.recipe.clone() };
    let text = recipe.to_toml()?;
    let path = out.join(RESULT);
    if let Some(known) = std::fs::read_to_string(&path).ok().and_then(|t| serde_json::from_str::<Ran>(&t).ok()) {
        if known.recipe == text {
            return Ok(known);
        }
        return Err(Error::run(&out, "holds a run of another recipe; choose another --out"));
    }
    let tried = once(grid, &recipe, progress, interrupted);
    if interrupted.load(Ordering::Relaxed) {
        return Err(Error::run(&grid.out, "interrupted; the same command goes on from here"));
    }
    let blank = Ran {
        name: contender.name.clone(),
        lr,
        seed,
        loss: None,
        error: None,
        steps: 0,
        tokens: 0,
        parameters: 0,
        peak_bytes: None,
        tokens_per_s: 0.0,
        seconds: 0.0,
        adapter_bytes: 0,
        curve: Vec::new(),
        recipe: text,
    };
    let ran = match tried {
        Ok(found) => Ran { name: blank.name, recipe: blank.recipe, ..found },
        Err(error) => Ran { error: Some(error.to_string()), ..blank },
    };
    std::fs::create_dir_all(&out).map_err(|e| Error::io(&out, e))?;
    let json = serde_json::to_string_pretty(&ran).map_err(|e| Error::run(&path, e.to_string()))?;
    atomic::write(&path, |file| std::io::Write::write_all(file, json.as_bytes()))?;
    Ok(ran)
}

fn once(grid: &Grid, recipe: &Recipe, progress: &mut dyn Progress, interrupted: &AtomicBool) -> Result<Ran> {
    resident::reset();
    let files = RunFolder::new(&recipe.out);
    let resume = !checkpoint::list(&files.checkpoints()).is_empty();
    let mut run = Run::prepare_again(recipe.clone(), resume)?;
    let plan = run.plan(0)?;
    let options = SessionOptions {
        scope: Scope::Adapter,
        resume,
        overwrite: !resume,
        allow_memory: false,
        command: "espalier compare".to_owned(),
    };
    let stop = AtomicBool::new(interrupted.load(Ordering::Relaxed));
    let tokens = match metrics::read(files.metrics()) {
        Ok(records) if resume => records.iter().map(|r| if let Record::Step(step) = r { step.tokens } else { 0 }).sum(),
        _ => 0,
    };
    let mut watch = Watch { inner: progress.observer(), budget: grid.budget, tokens, stop: &stop };
    let ended = session::run(&mut run, &plan, &options, &mut watch, &stop)?;
    let outcome = ended.outcome;
    let loss = match run.evaluate()? {
        Some((loss, _)) if loss.is_finite() => loss,
        Some((loss, _)) => return Err(Error::run(&recipe.out, format!("the held-out loss is {loss}"))),
        None => return Err(Error::recipe("eval_data", "no held-out row has a token to score")),
    };
    let weights = files.adapter().join(folder::WEIGHTS_FILE);
    let mut curve = Vec::new();
    let mut elapsed = 0.0;
    for record in metrics::read(files.metrics())? {
        match record {
            Record::Step(step) => elapsed = step.elapsed_s,
            Record::Eval(eval) => curve.push((eval.step, elapsed, eval.eval_loss)),
        }
    }
    Ok(Ran {
        name: String::new(),
        lr: recipe.lr,
        seed: recipe.seed,
        loss: Some(loss),
        error: None,
        steps: outcome.steps,
        tokens: outcome.tokens,
        parameters: outcome.trainable_parameters,
        peak_bytes: outcome.peak_memory_bytes,
        tokens_per_s: outcome.tokens_per_s,
        seconds: outcome.seconds,
        adapter_bytes: std::fs::metadata(&weights).map_err(|e| Error::io(&weights, e))?.len(),
        curve,
        recipe: String::new(),
    })
}
