//! a write that fails harms nothing that was written before.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use espalier_adapters::formats::faults::{measured, with_move_fault, with_write_fault};
use espalier_adapters::random::stream;
use espalier_train::{Observer, Recipe, Silent, checkpoint};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::runs::{self, Trace};
use crate::{Scope, Tally, Trial, writers};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-21",
    title: "Injected write faults",
    claim: "A write, rename or removal that fails (no space, I/O error, read-only; that one and all after it) ends a run with \
            an error, leaves every checkpoint that was said to be written whole and in its place, and the run resumed \
            afterwards gives the bits of one without faults, its lines of metrics too. Adapters, merged models, token stores \
            and trained tokenizers being replaced are the earlier one or the new one, or cannot be read, and after a write \
            that failed they are the earlier one. Faults are injected by one table that everything asks that writes: whole \
            files and folders, appended metrics and events, stores of tokens. CPU.",
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
    let recipes = runs::saving(scope.scratch)?;
    let share = scope.least.div_ceil(recipes.len() as u64 + 4);
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
    written(scope, tally, &mut rng, share)
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

/// What writes results beside runs.
fn written(scope: &Scope<'_>, tally: &mut Tally, rng: &mut ChaCha8Rng, share: u64) -> anyhow::Result<()> {
    for writer in writers::all(scope.scratch)? {
        let place = |n: u64| scope.scratch.join(format!("{}-{n}", writer.name.replace(' ', "-")));
        let whole = place(u64::MAX);
        (writer.before)(&whole)?;
        let earlier = writers::found(&writer, &whole);
        let (done, bytes, moves) = measured(|| (writer.write)(&whole));
        done?;
        let new = writers::found(&writer, &whole);
        ensure!(new.is_some() && new != earlier, "{}: nothing new was written", writer.name);
        for n in 0..share {
            let fault = Fault::draw(rng, bytes, moves);
            (writer.before)(&place(n))?;
            let tried = || -> anyhow::Result<()> {
                let ended = fault.inject(|| (writer.write)(&place(n)));
                ensure!(ended.is_err(), "the writer did not notice");
                let now = writers::found(&writer, &place(n));
                ensure!(now.is_none() || now == earlier || now == new, "neither the earlier result nor the new one");
                if fault.byte.is_some() {
                    ensure!(now == earlier, "a write that failed took the earlier result away");
                }
                let left = runs::leftovers(&place(n));
                ensure!(fault.byte.is_none() || left.is_empty(), "left: {left:?}");
                (writer.write)(&place(n))?;
                ensure!(writers::found(&writer, &place(n)) == new, "written again it is another");
                Ok(())
            };
            let found = tried();
            note(tally, &fault, writer.name, format!("{}: {}", writer.name, fault.describe()), found);
            std::fs::remove_dir_all(place(n))?;
        }
    }
    Ok(())
}
