//! how rows are cut into batches does not matter.

use anyhow::{Context, Result};
use espalier_train::Recipe;
use espalier_train::run::metrics::StepRecord;

use crate::runs;
use crate::subject::largest;
use crate::{Limit, Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-07",
    title: "Equal batches, cut differently",
    claim: "Eight rows a step give one curve over fifty steps in f32 on the CPU, as one batch of 8 or accumulated as 4 x 2, \
            2 x 4 or 1 x 8, with blocks recomputed (checkpointing), and, for next tokens, packed into one row without \
            padding; rows are of unequal length. Every method in each of its examples without dropout (the bounded form: \
            each method once, ten steps), next tokens and classes. Eight single steps are another run, and are seen to be.",
    unit: "largest |difference of a step's loss|",
    bar: 1e-3,
    bounded: 360,
    full: 8000,
    run,
};

const MEAN: Limit = Limit { unit: "largest mean |difference of losses| of a run", bar: 1e-5 };
const NORM: Limit = Limit { unit: "largest relative difference of a gradient's norm", bar: 1e-2 };

/// A way to cut the eight rows of a step.
type Cut = (&'static str, fn(Recipe) -> Recipe);

const CUTS: [Cut; 5] = [
    ("4 x 2", |r| Recipe { batch_size: 4, accumulation: 2, ..r }),
    ("2 x 4", |r| Recipe { batch_size: 2, accumulation: 4, ..r }),
    ("1 x 8", |r| Recipe { batch_size: 1, accumulation: 8, ..r }),
    ("checkpointed", |r| Recipe { checkpointing: true, ..r }),
    ("checkpointed 4 x 2", |r| Recipe { checkpointing: true, batch_size: 4, accumulation: 2, ..r }),
];
const PACKED: [Cut; 2] = [
    ("packed", |r| Recipe { packing: true, max_length: 100, batch_size: 1, ..r }),
    ("packed, checkpointed", |r| Recipe { packing: true, max_length: 100, batch_size: 1, checkpointing: true, ..r }),
];

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let mut methods = std::collections::BTreeSet::new();
    for (method, example, objective, recipe) in runs::of_eight(scope.scratch)? {
        if !scope.is_full() && !methods.insert((method, objective)) {
            continue;
        }
        let name = format!("{example}, {objective}");
        let steps = if scope.is_full() { 50 } else { 10 };
        let recipe = Recipe { max_steps: Some(steps), ..recipe };
        one(&name, objective, recipe, tally).with_context(|| name.clone())?;
    }
    Ok(())
}

fn one(name: &str, objective: &str, recipe: Recipe, tally: &mut Tally) -> Result<()> {
    let (_, whole) = runs::train(recipe.clone())?;
    let learns = whole.first().zip(whole.last()).is_some_and(|(first, last)| last.loss < first.loss);
    anyhow::ensure!(learns && Some(whole.len()) == recipe.max_steps, "{} steps that do not learn", whole.len());
    let packs = objective == runs::NEXT_TOKENS;
    for (cut, change) in CUTS.iter().chain(PACKED.iter().filter(|_| packs)) {
        let (_, steps) = runs::train(change(recipe.clone()))?;
        let errors = errors(&steps, &whole);
        anyhow::ensure!(errors.len() == whole.len(), "{cut}: {} steps", steps.len());
        for (i, error) in errors.iter().enumerate() {
            tally.value(format!("step {} of {name}, {cut}", i + 1), *error);
        }
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        let norm = |s: &StepRecord| s.grad_norm.unwrap_or(f64::NAN);
        let norms = largest(steps.iter().zip(&whole).map(|(a, b)| (norm(a) - norm(b)) / norm(b)));
        tally.beside(&MEAN, format!("{name}, {cut}"), mean);
        tally.beside(&NORM, format!("{name}, {cut}"), norms);
        let row = format!("{objective}, {cut}");
        tally.cell(row.clone(), "max |Δloss|", largest(errors));
        tally.cell(row.clone(), "mean |Δloss|", mean);
        tally.cell(row, "Δnorm / norm", norms);
        for (a, b) in steps.iter().zip(&whole) {
            anyhow::ensure!((a.tokens, a.trained_tokens) == (b.tokens, b.trained_tokens), "{cut}: other tokens");
        }
    }
    let (_, single) = runs::train(Recipe { batch_size: 1, ..recipe })?;
    let seen = largest(errors(&single, &whole));
    anyhow::ensure!(seen > TRIAL.bar, "single steps differ by {seen} only");
    Ok(())
}

fn errors(steps: &[StepRecord], whole: &[StepRecord]) -> Vec<f64> {
    steps.iter().zip(whole).map(|(a, b)| (a.loss - b.loss).abs()).collect()
}
