//! a killed run goes on as if it had not been killed.

use std::path::Path;
use std::time::Duration;

use espalier_adapters::formats::atomic::measured;
use espalier_adapters::random::stream;
use espalier_train::{Recipe, Silent, checkpoint};
use rand::Rng;

use crate::runs::{self, Trace};
use crate::worker::Job;
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-20",
    title: "kill -9 and resume",
    claim: "A run that a SIGKILL ended at any instant leaves only whole checkpoints, and resumed it gives the adapter, losses \
            and gradient norms of the run that was not killed, bit for bit, with nothing temporary left. Half of the \
            instants are just before a rename or removal, half are instants of the clock; some runs are killed twice. CPU, \
            next tokens and classes, every dynamics (in each of its examples, or in one of them), with dropout, shuffling, \
            evaluation, packing and a checkpoint after every step. The \
            system itself does not fail: what a power cut does to unwritten pages is not tried.",
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
    while tally.trials < scope.least {
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
