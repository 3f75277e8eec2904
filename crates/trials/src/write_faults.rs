//! a write that fails harms nothing that was written before.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use candle_core::DType;
use espalier_adapters::formats::atomic::{measured, with_move_fault, with_write_fault};
use espalier_adapters::formats::folder;
use espalier_adapters::random::stream;
use espalier_models::LoadOptions;
use espalier_models::export::ExportOptions;
use espalier_train::{Observer, Recipe, Silent, checkpoint};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::runs::{self, Trace};
use crate::subject::{self, acting};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-21",
    title: "Injected write faults",
    claim: "A write, rename or removal that fails (no space, I/O error, read-only; that one and all after it) ends a run with \
            an error, leaves every checkpoint that was said to be written whole and in its place, and the run resumed \
            afterwards gives the bits of one without faults; an adapter being replaced is the old one or the new one, and \
            a merged model that could not be written does not look like one. Faults are injected into the writer that all \
            of these go through, on the CPU; appended lines of metrics and events are not part of it.",
    unit: "faults that tore or lost something",
    bar: 0.0,
    bounded: 40,
    full: 500,
    run,
};

/// Error numbers of the system: no space, I/O error, read-only.
const ERRORS: [(&str, i32); 3] = [("no space", 28), ("I/O error", 5), ("read-only", 30)];

/// Where and how to fail.
struct Fault {
    error: (&'static str, i32),
    byte: Option<u64>,
    at_move: u32,
}

impl Fault {
    fn draw(rng: &mut ChaCha8Rng, bytes: u64, moves: u32) -> Self {
        let error = ERRORS[rng.random_range(0..ERRORS.len())];
        let byte = rng.random_range(0..bytes);
        Self { error, byte: rng.random_bool(0.6).then_some(byte), at_move: rng.random_range(0..moves) }
    }

    fn inject<T>(&self, f: impl FnOnce() -> T) -> T {
        match self.byte {
            Some(byte) => with_write_fault(byte, self.error.1, f),
            None => with_move_fault(self.at_move, self.error.1, f),
        }
    }

    fn describe(&self) -> String {
        match self.byte {
            Some(byte) => format!("{} after {byte} bytes", self.error.0),
            None => format!("{} at move {}", self.error.0, self.at_move),
        }
    }
}

/// Keeps the step of the newest checkpoint that was said to be written.
#[derive(Default)]
struct Newest(Option<PathBuf>);

impl Observer for Newest {
    fn checkpoint(&mut self, path: &Path) {
        self.0 = Some(path.to_owned());
    }
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let mut rng = stream(21, "faults");
    let recipes = runs::saving(scope.scratch, scope.is_full())?;
    let share = scope.least.div_ceil(recipes.len() as u64 + 2);
    for (i, (name, recipe)) in recipes.iter().enumerate() {
        let at = |part: String| Recipe { out: scope.scratch.join(part).display().to_string(), ..recipe.clone() };
        let whole = at(format!("whole-{i}"));
        let (done, bytes, moves) = measured(|| runs::session(&whole, false, &mut Silent));
        done?;
        let whole = Trace::of(Path::new(&whole.out))?;
        for n in 0..share {
            let fault = Fault::draw(&mut rng, bytes, moves);
            let (what, recipe) = (format!("{name}: {}", fault.describe()), at(format!("fault-{i}-{n}")));
            let found = of_run(&fault, &recipe, &whole);
            note(tally, &fault, name, what, found);
            let _ = std::fs::remove_dir_all(&recipe.out);
        }
    }
    adapters(scope, tally, &mut rng, share)?;
    models(scope, tally, &mut rng, share)
}

fn note(tally: &mut Tally, fault: &Fault, kind: &str, what: String, found: anyhow::Result<()>) {
    match found {
        Ok(()) => tally.held(what, true),
        Err(e) => tally.held(format!("{what}: {e:#}"), false),
    }
    tally.count(kind);
    tally.count(if fault.byte.is_some() { "a write failed" } else { "a rename or removal failed" });
    tally.count(fault.error.0);
}

fn of_run(fault: &Fault, recipe: &Recipe, whole: &Trace) -> anyhow::Result<()> {
    let out = Path::new(&recipe.out);
    let mut newest = Newest::default();
    let ended = fault.inject(|| runs::session(recipe, false, &mut newest));
    ensure!(ended.is_err(), "the run did not notice");
    let torn = runs::torn(out);
    ensure!(torn.is_empty(), "torn: {torn:?}");
    if let Some(newest) = newest.0 {
        let listed = checkpoint::list(&out.join("checkpoints"));
        ensure!(listed.iter().any(|(_, path)| *path >= newest), "{} is missing", newest.display());
    }
    runs::session(recipe, out.exists(), &mut Silent)?;
    ensure!(Trace::of(out)? == *whole, "the resumed run has other bits");
    let left = runs::leftovers(out);
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

/// The two files of an adapter, as they are read.
fn contents(folder: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    folder::read(folder)?;
    [folder::CONFIG_FILE, folder::WEIGHTS_FILE].iter().map(|file| Ok(std::fs::read(folder.join(file))?)).collect()
}

/// An adapter that replaces another in its folder.
fn adapters(scope: &Scope<'_>, tally: &mut Tally, rng: &mut ChaCha8Rng, share: u64) -> anyhow::Result<()> {
    let subjects = subject::all()?;
    let made: Vec<_> = subjects.iter().filter(|s| s.golden().is_none()).take(2).collect();
    let [old, new] = made[..] else { anyhow::bail!("too few examples of methods") };
    let mut model = new.model(&LoadOptions::cpu())?;
    let attached = new.attach(&mut model)?;
    let place = |n: u64| scope.scratch.join(format!("adapter-{n}"));
    old.files(&place(u64::MAX))?;
    let before = contents(&place(u64::MAX))?;
    let (done, bytes, moves) = measured(|| folder::save(&mut model, &attached, &place(u64::MAX)));
    done?;
    let after = contents(&place(u64::MAX))?;
    ensure!(before != after, "both adapters are the same");
    for n in 0..share {
        let fault = Fault::draw(rng, bytes, moves);
        old.files(&place(n))?;
        let mut tried = || -> anyhow::Result<()> {
            let ended = fault.inject(|| folder::save(&mut model, &attached, &place(n)));
            ensure!(ended.is_err(), "the writer did not notice");
            let now = contents(&place(n))?;
            ensure!(now == before || now == after, "neither the old adapter nor the new one");
            folder::save(&mut model, &attached, &place(n))?;
            ensure!(contents(&place(n))? == after, "written again it is another");
            Ok(())
        };
        let found = tried();
        note(tally, &fault, "an adapter replaced", fault.describe(), found);
    }
    Ok(())
}

/// A merged model that is written.
fn models(scope: &Scope<'_>, tally: &mut Tally, rng: &mut ChaCha8Rng, share: u64) -> anyhow::Result<()> {
    let subjects = subject::all()?;
    let subject = subjects.iter().find(|s| s.golden().is_none()).ok_or_else(|| anyhow::anyhow!("no example"))?;
    let mut model = subject.model(&LoadOptions::cpu())?;
    let attached = subject.attach(&mut model)?;
    let merged = acting(&mut model, attached)?.merge(&mut model, DType::F32)?;
    let options = ExportOptions { untie: merged.unties, ..ExportOptions::default() };
    let place = |n: u64| scope.scratch.join(format!("model-{n}"));
    let (done, bytes, moves) = measured(|| model.export(&place(u64::MAX), &options));
    done?;
    for n in 0..share {
        let fault = Fault::draw(rng, bytes, moves);
        let mut tried = || -> anyhow::Result<()> {
            let ended = fault.inject(|| model.export(&place(n), &options));
            ensure!(ended.is_err(), "the writer did not notice");
            if let Ok(found) = espalier_models::Model::load(&place(n), &LoadOptions::cpu()) {
                let d = subject::difference(&subject::scores(&found)?, &subject::scores(&model)?)?;
                ensure!(d == 0.0, "a model that says something else can be loaded");
            }
            model.export(&place(n), &options)?;
            let found = espalier_models::Model::load(&place(n), &LoadOptions::cpu())?;
            ensure!(subject::difference(&subject::scores(&found)?, &subject::scores(&model)?)? == 0.0, "another model");
            Ok(())
        };
        let found = tried();
        note(tally, &fault, "a merged model written", fault.describe(), found);
    }
    Ok(())
}
