//! what goes wrong in the middle of a run costs at most one save interval.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use candle_core::{Device, Tensor};
use espalier_adapters::formats::safetensors::{self, Entry, TensorFile};
use espalier_train::run::metrics::{EvalRecord, StepRecord};
use espalier_train::{Error, Observer, Recipe, Silent, checkpoint};

use crate::made::{self, Shape};
use crate::runs::{self, Trace};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-23",
    title: "Faults in the middle of a run",
    claim: "A loss that is no number, updates that explode, a token store that is changed or cut off, and a base \
            file that is cut off, in the middle of a run: the run ends before the step is taken, with an error that names step \
            or file (or goes on, where it does not need the file any more); no more than one save interval is lost; the \
            checkpoints are whole; going on ends at the same step again where the fault is in the run, and gives the bits of \
            the run without a fault where it was repaired. An evaluation that is no number changes no step, and is never \
            the best one. A weight file that is cut off while it is read is an error that names tensor and file.",
    unit: "faults that cost more, tore something or were not named",
    bar: 0.0,
    bounded: 25,
    full: 100,
    run,
};

/// Does something when a step was taken, and keeps what was said.
struct Saboteur<'a> {
    at: u64,
    act: Option<Box<dyn FnOnce() -> anyhow::Result<()> + 'a>>,
    steps: Vec<(u64, u64)>,
    evaluations: Vec<f64>,
    notices: Vec<String>,
}

impl<'a> Saboteur<'a> {
    fn new(at: u64, act: impl FnOnce() -> anyhow::Result<()> + 'a) -> Self {
        Self { at, act: Some(Box::new(act)), steps: Vec::new(), evaluations: Vec::new(), notices: Vec::new() }
    }

    fn idle() -> Self {
        Self::new(0, || Ok(()))
    }
}

impl Observer for Saboteur<'_> {
    fn step(&mut self, record: &StepRecord) -> espalier_train::Result<()> {
        self.steps.push((record.step, record.loss.to_bits()));
        if record.step == self.at && let Some(act) = self.act.take() {
            act().map_err(|e| Error::recipe("saboteur", e.to_string()))?;
        }
        Ok(())
    }

    fn evaluation(&mut self, record: &EvalRecord) -> espalier_train::Result<()> {
        self.evaluations.push(record.eval_loss);
        Ok(())
    }

    fn notice(&mut self, text: &str) {
        self.notices.push(text.to_owned());
    }
}

/// Steps of a whole run.
const STEPS: usize = 7;
/// The table of vectors, and the tokens in it that are no numbers.
const TABLE: &str = "model.embed_tokens.weight";
const POISONED: [(usize, f32); 2] = [(50, f32::NAN), (51, f32::INFINITY)];

/// The model with its poisoned tokens, in `folder`.
fn model(folder: &Path) -> anyhow::Result<()> {
    made::write(folder, made::llama(Shape { hidden: 128, ff: 192, layers: 2, vocab: 64 }))?;
    let file = folder.join("model.safetensors");
    let mut tensors = TensorFile::open(&file)?.load_all(&Device::Cpu)?;
    let table = tensors.get_mut(TABLE).context(TABLE)?;
    let mut rows = table.to_vec2::<f32>()?;
    for (token, value) in POISONED {
        rows[token].fill(value);
    }
    let dims = table.dims().to_vec();
    *table = Tensor::from_vec(rows.concat(), dims, &Device::Cpu)?;
    let entries = tensors.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
    safetensors::write(&file, entries, &[("format".to_owned(), "pt".to_owned())].into())?;
    Ok(())
}

/// Fifty rows without a poisoned token; row `at`, from 0, holds `token`.
fn rows(at: Option<(usize, usize)>) -> anyhow::Result<String> {
    let text = runs::rows_of(50, 16, 40)?;
    let row = |(i, line): (usize, &str)| match at {
        Some((n, token)) if n == i => format!("{{\"input_ids\": [5, 9, {token}, 7, {token}, 8, 11]}}\n"),
        _ => format!("{line}\n"),
    };
    Ok(text.lines().enumerate().map(row).collect())
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let folder = scope.scratch.join("model");
    model(&folder)?;
    let clean = scope.scratch.join("clean.jsonl");
    std::fs::write(&clean, rows(None)?)?;
    let recipe = Recipe {
        model: folder.display().to_string(),
        device: "cpu".into(),
        dtype: "f32".into(),
        data: runs::data(&clean),
        batch_size: 2,
        shuffle: false,
        lr: 1e-3,
        max_steps: Some(STEPS),
        keep_checkpoints: 3,
        ..Recipe::default()
    };
    let trial = Faults { scratch: scope.scratch, recipe };
    let steps: Vec<usize> = if scope.is_full() { (2..STEPS).collect() } else { vec![2, 5] };
    let intervals: &[usize] = if scope.is_full() { &[1, 2, 3, 4] } else { &[2] };
    for &interval in intervals {
        trial.explodes(interval, tally)?;
        for &at in &steps {
            for (token, value) in POISONED {
                trial.poisoned(&format!("a vector of {value}"), token, at, interval, tally)?;
            }
            for cut in [true, false] {
                trial.store(cut, at, interval, tally)?;
            }
            trial.base(at, interval, tally)?;
            trial.evaluation(at, interval, tally)?;
        }
    }
    trial.read(tally)
}

struct Faults<'a> {
    scratch: &'a Path,
    recipe: Recipe,
}

/// What a run left that ended at a step.
fn left(out: &Path, ended_at: usize, interval: usize) -> anyhow::Result<()> {
    let torn = runs::torn(out);
    ensure!(torn.is_empty(), "torn: {torn:?}");
    let newest = checkpoint::list(&out.join("checkpoints")).last().map_or(0, |(step, _)| *step);
    ensure!(newest + interval >= ended_at, "ended before step {ended_at}, the newest checkpoint is of step {newest}");
    Ok(())
}

/// The bytes of all checkpoints.
fn saved(out: &Path) -> Vec<(usize, Vec<Vec<u8>>)> {
    let read = |path: PathBuf| {
        let mut files: Vec<PathBuf> = std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect();
        files.sort();
        files.into_iter().filter_map(|file| std::fs::read(file).ok()).collect()
    };
    checkpoint::list(&out.join("checkpoints")).into_iter().map(|(step, path)| (step, read(path))).collect()
}

impl Faults<'_> {
    /// The recipe in a folder of its own, saved every `interval` steps.
    fn at(&self, name: &str, interval: usize) -> anyhow::Result<(Recipe, PathBuf)> {
        let out = self.scratch.join(name);
        let _ = std::fs::remove_dir_all(&out);
        Ok((Recipe { out: out.display().to_string(), save_every: interval, ..self.recipe.clone() }, out))
    }

    fn note(&self, tally: &mut Tally, kind: &str, at: usize, interval: usize, found: anyhow::Result<()>) {
        tally.count(kind);
        let held = found.is_ok();
        let text = found.err().map_or(String::new(), |e| format!("{e:#}"));
        tally.held(format!("{kind}, step {at}, saved every {interval}: {text}"), held);
    }

    /// The trace of the run without a fault.
    fn whole(&self, recipe: &Recipe) -> anyhow::Result<Trace> {
        let out = self.scratch.join("whole");
        let _ = std::fs::remove_dir_all(&out);
        runs::session(&Recipe { out: out.display().to_string(), ..recipe.clone() }, false, &mut Silent)?;
        Trace::of(&out)
    }

    /// Ends with an error that names the step, twice at the same one, with the checkpoints as they were.
    fn ends_at(&self, recipe: &Recipe, out: &Path, at: usize, interval: usize) -> anyhow::Result<()> {
        let ends = |resume: bool| match runs::session(recipe, resume, &mut Silent) {
            Ok(_) => anyhow::bail!("the run went on to its end"),
            Err(Error::NotFinite { step, checkpoint, .. }) => {
                ensure!(step == at, "ended at step {step}");
                let newest = checkpoint::list(&out.join("checkpoints")).pop();
                let named = newest.is_none_or(|(_, path)| checkpoint == path.display().to_string());
                ensure!(named, "the error names {checkpoint} as the last good checkpoint");
                Ok(())
            }
            Err(e) => anyhow::bail!("another error: {e}"),
        };
        ends(false)?;
        left(out, at, interval)?;
        let before = saved(out);
        ends(true).context("resumed")?;
        ensure!(saved(out) == before, "the second end changed the checkpoints");
        Ok(())
    }

    /// A row of step `at` holds a poisoned token.
    fn poisoned(&self, what: &str, token: usize, at: usize, interval: usize, tally: &mut Tally) -> anyhow::Result<()> {
        let (recipe, out) = self.at("poisoned", interval)?;
        let file = self.scratch.join("poisoned.jsonl");
        std::fs::write(&file, rows(Some((2 * (at - 1), token)))?)?;
        let recipe = Recipe { data: runs::data(&file), ..recipe };
        let found = self.ends_at(&recipe, &out, at, interval);
        self.note(tally, what, at, interval, found);
        Ok(())
    }

    /// Updates so large that the next loss is no number.
    fn explodes(&self, interval: usize, tally: &mut Tally) -> anyhow::Result<()> {
        let (recipe, out) = self.at("explodes", interval)?;
        let recipe = Recipe { lr: 1e30, max_grad_norm: 0.0, schedule: "constant".into(), ..recipe };
        let found = match runs::session(&recipe, false, &mut Silent) {
            Err(Error::NotFinite { step, .. }) => {
                std::fs::remove_dir_all(&out)?;
                self.ends_at(&recipe, &out, step, interval)
            }
            Err(e) => Err(anyhow::anyhow!("another error: {e}")),
            Ok(_) => Err(anyhow::anyhow!("the run went on to its end")),
        };
        self.note(tally, "updates that explode", 0, interval, found);
        Ok(())
    }

    /// The token store is cut off, or one of its bytes changed, after step `at`.
    fn store(&self, cut: bool, at: usize, interval: usize, tally: &mut Tally) -> anyhow::Result<()> {
        let (recipe, out) = self.at("store", interval)?;
        let cache = self.scratch.join("cache");
        let _ = std::fs::remove_dir_all(&cache);
        let recipe = Recipe { cache_dir: Some(cache.display().to_string()), ..recipe };
        let whole = self.whole(&recipe)?;
        let file = std::fs::read_dir(&cache)?.next().context("no token store")??.path();
        let act = || -> anyhow::Result<()> {
            // In place, as a failing disk or another program does it.
            let bytes = std::fs::read(&file)?;
            let open = std::fs::OpenOptions::new().write(true).open(&file)?;
            if cut {
                open.set_len(64)?;
            } else {
                // A token of the row that comes next.
                let next: usize = (0..2 * at).map(|i| 8 * (5 + (i * 7) % 12)).sum();
                std::os::unix::fs::FileExt::write_all_at(&open, &[bytes[next] ^ 1], next as u64)?;
            }
            Ok(())
        };
        let mut saboteur = Saboteur::new(at as u64, act);
        let tried = || -> anyhow::Result<()> {
            match runs::session(&recipe, false, &mut saboteur) {
                Ok(_) => anyhow::bail!("the run did not notice"),
                Err(e) => ensure!(e.to_string().contains(".tokens"), "the file is not named: {e}"),
            }
            left(&out, at + 1, interval)?;
            // A store that is damaged is made anew.
            runs::session(&recipe, true, &mut Silent).context("resumed")?;
            ensure!(Trace::of(&out)? == whole, "the resumed run has other bits");
            Ok(())
        };
        let mut tried = tried;
        let found = tried();
        self.note(tally, if cut { "token store cut off" } else { "token store changed" }, at, interval, found);
        Ok(())
    }

    /// The base's weights are cut off after step `at`.
    fn base(&self, at: usize, interval: usize, tally: &mut Tally) -> anyhow::Result<()> {
        let (recipe, out) = self.at("base", interval)?;
        let whole = self.whole(&recipe)?;
        let file = Path::new(&recipe.model).join("model.safetensors");
        let bytes = std::fs::read(&file)?;
        let act = || -> anyhow::Result<()> {
            std::fs::OpenOptions::new().write(true).open(&file)?.set_len(bytes.len() as u64 / 2)?;
            Ok(())
        };
        let mut saboteur = Saboteur::new(at as u64, act);
        let mut tried = || -> anyhow::Result<()> {
            runs::session(&recipe, false, &mut saboteur).context("the weights were in memory")?;
            ensure!(Trace::of(&out)? == whole, "the run has other bits");
            let before = saved(&out);
            match runs::session(&recipe, true, &mut Silent) {
                Ok(_) => anyhow::bail!("a base that is cut off was taken"),
                Err(e) => {
                    let text = e.to_string();
                    ensure!(text.contains("model.safetensors") && text.contains("truncated"), "not named: {text}");
                }
            }
            ensure!(saved(&out) == before, "the refusal changed the checkpoints");
            Ok(())
        };
        let found = tried();
        std::fs::write(&file, &bytes)?;
        self.note(tally, "base file cut off", at, interval, found);
        Ok(())
    }

    /// Evaluations that are no number, from the first on.
    fn evaluation(&self, at: usize, interval: usize, tally: &mut Tally) -> anyhow::Result<()> {
        let (recipe, _) = self.at("evaluation", interval)?;
        let file = self.scratch.join("eval.jsonl");
        std::fs::write(&file, rows(Some((3, 50)))?)?;
        let tried = || -> anyhow::Result<()> {
            let mut without = Saboteur::idle();
            runs::session(&recipe, false, &mut without)?;
            std::fs::remove_dir_all(&recipe.out)?;
            let evaluated = Recipe { eval_data: runs::data(&file), eval_every: at, ..recipe.clone() };
            let mut with = Saboteur::idle();
            let outcome = runs::session(&evaluated, false, &mut with)?.outcome;
            ensure!(with.steps == without.steps, "the steps differ from those without an evaluation");
            ensure!(!with.evaluations.is_empty() && with.evaluations.iter().all(|e| e.is_nan()), "{:?}", with.evaluations);
            ensure!(outcome.best.is_none(), "the best one is {:?}", outcome.best);
            ensure!(with.notices.iter().any(|n| n.contains("NaN")), "nothing was said: {:?}", with.notices);
            let torn = runs::torn(Path::new(&recipe.out));
            ensure!(torn.is_empty(), "torn: {torn:?}");
            Ok(())
        };
        let found = tried();
        self.note(tally, "evaluation that is no number", at, interval, found);
        Ok(())
    }

    /// A weight file that is cut off between its opening and the reading of its tensors.
    fn read(&self, tally: &mut Tally) -> anyhow::Result<()> {
        let file = self.scratch.join("cut.safetensors");
        let from = Path::new(&self.recipe.model).join("model.safetensors");
        let header = std::fs::read(&from)?.first_chunk().copied().map_or(0, u64::from_le_bytes);
        let names: Vec<String> = TensorFile::open(&from)?.entries().into_iter().map(|(name, ..)| name).collect();
        for name in names {
            std::fs::copy(&from, &file)?;
            let open = TensorFile::open(&file)?;
            std::fs::OpenOptions::new().write(true).open(&file)?.set_len(8 + header)?;
            let found = match open.load(&name, &Device::Cpu) {
                Ok(_) => Err(anyhow::anyhow!("it was read")),
                Err(e) => {
                    let text = e.to_string();
                    let named = text.contains(&name) && text.contains("cut.safetensors") && text.contains("cut off");
                    if named { Ok(()) } else { Err(anyhow::anyhow!("{text}")) }
                }
            };
            self.note(tally, "weight file cut off while it is read", 0, 0, found.context(name));
        }
        Ok(())
    }
}
