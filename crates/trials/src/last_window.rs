//! what is left of an epoch is weighed by its tokens.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;
use espalier_adapters::formats::folder;
use espalier_train::{Recipe, Silent, checkpoint};

use crate::golden::{self, Case};
use crate::runs;
use crate::subject::{relative, values};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-08",
    title: "Last windows of an epoch",
    claim: "Ten rows of unequal length in batches of two, accumulated by three, leave a last window of two batches; its \
            gradient is that of its four rows as one batch: the norm of the difference over the norm, all tensors \
            together. The trainer's own, in f32 on the CPU: AdamW with beta1 = 0 keeps the gradient as its first moment, \
            which is read from the checkpoint. Every golden adapter of PEFT that is not refused (the bounded form: every fourth); \
            next tokens and classes. \
            The mean of the two batches' means is another gradient, and is seen to be.",
    unit: "largest relative error of a gradient, f32",
    bar: 2e-6,
    bounded: 10,
    full: 37,
    run,
};

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let every = if scope.is_full() { 1 } else { 4 };
    for case in golden::cases()?.into_iter().filter(|case| case.refused.is_none()).step_by(every) {
        if folder::read_config(&case.path)?.method.check_schedule(2).is_err() {
            tally.count("methods whose schedule has no place in so few steps");
            continue;
        }
        let folder = scope.scratch.join(&case.name);
        std::fs::create_dir_all(&folder)?;
        one(&case, &folder, tally).with_context(|| case.name.clone())?;
    }
    Ok(())
}

/// First moments after the last step of a run in `out`.
fn moments(recipe: Recipe, out: &Path) -> Result<BTreeMap<String, Tensor>> {
    let out_folder = out.display().to_string();
    // Nothing moves, so that every window sees the same adapter.
    let recipe = Recipe { lr: 0.0, beta1: 0.0, max_grad_norm: 0.0, save_every: 1, out: out_folder, ..recipe };
    runs::session(&recipe, false, &mut Silent)?;
    let (_, newest) = checkpoint::list(&out.join("checkpoints")).pop().context("no checkpoint")?;
    let all = golden::tensors(&newest.join(checkpoint::OPTIMIZER))?;
    let moments: BTreeMap<_, _> =
        all.into_iter().filter_map(|(name, t)| Some((name.strip_prefix("m.")?.to_owned(), t))).collect();
    anyhow::ensure!(!moments.is_empty(), "no moments in {}", newest.display());
    Ok(moments)
}

/// Norm of a difference over the norm of `b`, all tensors together.
fn apart(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> Result<f64> {
    anyhow::ensure!(a.keys().eq(b.keys()), "other tensors");
    let (mut difference, mut norm) = (0.0, 0.0);
    for (a, b) in a.values().zip(b.values()) {
        let (a, b) = (values(a)?, values(b)?);
        difference += a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        norm += b.iter().map(|b| b.powi(2)).sum::<f64>();
    }
    Ok((difference / norm).sqrt())
}

fn one(case: &Case, folder: &Path, tally: &mut Tally) -> Result<()> {
    let epoch = Recipe { batch_size: 2, accumulation: 3, max_steps: Some(2), ..runs::of_rows(case, folder, 0..10)? };
    let rest = Recipe { batch_size: 4, max_steps: Some(1), ..runs::of_rows(case, folder, 6..10)? };
    let halves = [6..8, 8..10].map(|rows| -> Result<_> {
        let recipe = Recipe { batch_size: 2, max_steps: Some(1), ..runs::of_rows(case, folder, rows.clone())? };
        moments(recipe, &folder.join(format!("half-{}", rows.start)))
    });
    let window = moments(epoch, &folder.join("window"))?;
    let whole = moments(rest, &folder.join("whole"))?;
    let error = apart(&window, &whole)?;
    tally.value(case.name.clone(), error);
    let uses = case.uses()?;
    tally.cell(uses.clone(), "all tensors", error);
    for (name, tensor) in &window {
        tally.cell(uses.clone(), "worst tensor", relative(tensor, whole.get(name).context("no tensor")?)?);
    }
    let [first, second] = halves;
    let (first, second) = (first?, second?);
    let mean = first.iter().map(|(name, a)| {
        let b = second.get(name).context("no tensor")?;
        Ok((name.clone(), ((a + b)? * 0.5)?))
    });
    let seen = apart(&mean.collect::<Result<_>>()?, &whole)?;
    // Two batches of two rows weigh the same where rows are weighed.
    let rows = case.labels()?.is_some();
    anyhow::ensure!(rows || seen > 1e-3, "the mean of means differs by {seen} only");
    Ok(())
}
