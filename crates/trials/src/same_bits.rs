//! the same run gives the same bits.

use espalier_train::Recipe;

use crate::runs::{self, Trace};
use crate::worker::Job;
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-13",
    title: "Same bits over repeated runs and threads",
    claim: "A run on the CPU gives the same adapter, losses and gradient norms bit for bit, however often it is repeated and \
            on however many threads: processes of their own, every method in each of its examples, two steps of two \
            micro-batches on the embedded model. Another set of vector instructions, or a CUDA device, may give other bits.",
    unit: "runs with another bit",
    bar: 0.0,
    bounded: 14,
    full: 100,
    run,
};

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let (threads, repeats): (&[usize], usize) = if scope.is_full() { (&[1, 2, 4, 16], 3) } else { (&[4], 1) };
    for (i, (name, recipe)) in runs::of_methods(scope.scratch)?.into_iter().enumerate() {
        let once = |threads: usize, n: usize| -> anyhow::Result<Trace> {
            let out = scope.scratch.join(format!("run-{i}-{threads}-{n}"));
            let recipe = Recipe { out: out.display().to_string(), ..recipe.clone() };
            let job = Job { recipe: recipe.to_toml()?, resume: false, stand_still: None };
            scope.worker.finish(&job, &scope.scratch.join("job.json"), Some(threads))?;
            Trace::of(&out)
        };
        let first = once(1, repeats)?;
        for n in 0..repeats {
            for threads in threads {
                tally.held(format!("{name}: {threads} threads, repetition {n}"), once(*threads, n)? == first);
                tally.count(format!("{threads} threads against 1"));
            }
        }
    }
    Ok(())
}
