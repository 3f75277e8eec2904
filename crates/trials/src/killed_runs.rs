//! a killed run goes on as if it had not been killed.

use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use espalier_adapters::formats::faults::{measured, with_kill_before};
use espalier_adapters::random::stream;
use espalier_train::{Recipe, Silent, checkpoint};
use rand::Rng;

use crate::runs::{self, Trace};
use crate::worker::Job;
use crate::{Scope, Tally, Trial, writers};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-20",
    title: "kill -9 and resume",
    claim: "A run that a SIGKILL ended at any instant leaves only whole checkpoints, and resumed it gives the adapter, losses \
            and gradient norms of the run that was not killed, bit for bit, with nothing temporary left. Half of the \
            instants are just before a rename or removal, half are instants of the clock; some runs are killed twice. CPU, \
            next tokens, classes, a new model trained whole and every dynamics (in each of its examples, or in one of them), with dropout, shuffling, evaluation, packing and a checkpoint \
            after every step. Adapters replaced, models merged into a folder and tokenizers trained, each ended before every \
            one of its renames and removals, leave the earlier result, the new one or none, and done again give the new one. \
            The system itself does not fail: what a power cut does to unwritten pages is not tried.",
    unit: "killed runs that went on otherwise",
    bar: 0.0,
    bounded: 14,
    full: 200,
    run,
};

struct Case {
    name: String,
    recipe: Recipe,
    whole: Trace,
    moves: u32,
    took: Duration,
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let mut cases = Vec::new();
    for (i, (name, recipe)) in runs::saving(scope.scratch, scope.is_full())?.into_iter().enumerate() {
        let at = |part: &str| {
            let out = scope.scratch.join(format!("{part}-{i}"));
            Recipe { out: out.display().to_string(), ..recipe.clone() }
        };
        let (inside, outside) = (at("inside"), at("outside"));
        let (done, _, moves) = measured(|| runs::session(&inside, false, &mut Silent));
        done?;
        let job = Job { recipe: outside.to_toml()?, resume: false, stand_still: None };
        let took = scope.worker.finish(&job, &scope.scratch.join("job.json"), None)?;
        let whole = Trace::of(Path::new(&inside.out))?;
        anyhow::ensure!(whole == Trace::of(Path::new(&outside.out))?, "{name}: two whole runs differ");
        cases.push(Case { name, recipe, whole, moves, took });
    }
    let mut rng = stream(20, "instants");
    let mut attempts = 0;
    ended_writers(scope, tally)?;
    let enough = tally.trials + scope.least;
    while tally.trials < enough {
        attempts += 1;
        anyhow::ensure!(attempts < 4 * scope.least + 40, "workers end before they can be killed");
        let case = &cases[(attempts - 1) as usize % cases.len()];
        let out = scope.scratch.join(format!("killed-{attempts}"));
        let twice = rng.random_bool(0.25);
        // Both ways for every case: in turn, and in the other order the next time round.
        let by_clock = (attempts + attempts / cases.len() as u64) % 2 == 1;
        let mut kills = 0;
        for _ in 0..=usize::from(twice) {
            let (move_, share) = (rng.random_range(0..case.moves), rng.random_range(0.05..1.0));
            let (stand_still, wait) = match by_clock {
                true => (None, Some(case.took.mul_f64(share))),
                false => (Some(move_), None),
            };
            let recipe = Recipe { out: out.display().to_string(), ..case.recipe.clone() };
            let job = Job { recipe: recipe.to_toml()?, resume: out.exists(), stand_still };
            kills += usize::from(scope.worker.start(&job, &scope.scratch.join("job.json"), None)?.kill(wait)?);
            let torn = runs::torn(&out);
            anyhow::ensure!(torn.is_empty(), "{}, kill {attempts}: {torn:?}", case.name);
        }
        if kills == 0 {
            continue;
        }
        let recipe = Recipe { out: out.display().to_string(), ..case.recipe.clone() };
        let name = format!("{}, kill {attempts}", case.name);
        let found = !checkpoint::list(&out.join("checkpoints")).is_empty();
        match runs::session(&recipe, out.exists(), &mut Silent) {
            Err(e) => {
                tally.held(format!("{name}: {e}"), false);
            }
            Ok(_) => {
                let left = runs::leftovers(&out);
                let same = Trace::of(&out)? == case.whole;
                tally.held(format!("{name}: same bits {same}, left {left:?}"), same && left.is_empty());
            }
        }
        tally.count(&case.name);
        tally.count(if by_clock { "by the clock" } else { "before a rename or removal" });
        if kills == 2 {
            tally.count("killed twice");
        }
        if found {
            tally.count("went on from a checkpoint");
        }
        std::fs::remove_dir_all(&out)?;
    }
    Ok(())
}

/// Writes into a folder; ended before each rename or removal in turn, then done again.
fn ended_writers(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    for writer in writers::all(scope.scratch)? {
        let place = |n: u32| scope.scratch.join(format!("{}-{n}", writer.name.replace(' ', "-")));
        let whole = place(u32::MAX);
        (writer.before)(&whole)?;
        let earlier = writers::found(&writer, &whole);
        let (done, _, moves) = measured(|| (writer.write)(&whole));
        done?;
        let new = writers::found(&writer, &whole);
        anyhow::ensure!(new.is_some() && new != earlier && moves > 0, "{}: nothing new was written", writer.name);
        for n in 0..moves {
            let at = place(n);
            (writer.before)(&at)?;
            let ended = quietly(|| with_kill_before(n, || (writer.write)(&at)));
            let now = writers::found(&writer, &at);
            let sane = now.is_none() || now == earlier || now == new;
            (writer.write)(&at)?;
            let again = writers::found(&writer, &at) == new;
            let name = format!("{}, before move {n}: ended {ended}, sane {sane}, again {again}", writer.name);
            tally.held(name, ended && sane && again);
            tally.count(format!("{}, before a rename or removal", writer.name));
            std::fs::remove_dir_all(&at)?;
        }
    }
    Ok(())
}

/// Whether `f` was ended by [`with_kill_before`], whose panic says nothing here.
fn quietly<T>(f: impl FnOnce() -> T) -> bool {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let other = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref::<&str>().is_none_or(|text| !text.contains("with_kill_before")) {
                other(info);
            }
        }));
    });
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err()
}
