//! gradients of adapters are those of PEFT.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use espalier_adapters::Flow;
use espalier_adapters::formats::folder::{self, CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::safetensors::{self, Entry};
use espalier_data::Batch;
use espalier_models::TokenBatch;
use espalier_train::objective::causal::Causal;
use espalier_train::objective::classification::Classification;
use espalier_train::objective::{Objective, Targets};
use espalier_train::tape::{self, Gradients, Start};

use crate::golden::{self, Case};
use crate::subject::{acting, relative};
use crate::{Limit, Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-02",
    title: "Gradient parity with PEFT",
    claim: "The gradient of every trainable tensor of an adapter that PEFT wrote is the one that PEFT and torch compute, on \
            the CPU in f32, through the trainer's own pass; the error is the largest difference over the tensor's largest \
            gradient. Every folder of `parity/golden/adapters` that is not refused; next tokens with some labels left out, \
            or classes. A row of the table is what a case uses beside linear maps.",
    unit: "largest relative error of a tensor's gradient, f32",
    bar: 1e-4,
    bounded: 556,
    full: 556,
    run,
};

const LOSS: Limit = Limit { unit: "largest relative error of the loss, f32", bar: 1e-5 };

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    for case in golden::cases()?.into_iter().filter(|case| case.refused.is_none()) {
        one(&case, scope.scratch, tally).with_context(|| case.name.clone())?;
    }
    Ok(())
}

/// PEFT's batch, and its targets.
fn batch(expected: &BTreeMap<String, Tensor>, classes: Option<usize>) -> Result<(Batch, Targets)> {
    let get = |key: &str| expected.get(key).with_context(|| format!("no {key}"));
    let ids: Vec<Vec<i64>> = get("ids")?.to_vec2()?;
    let (rows, cols) = (ids.len(), ids.first().map_or(0, Vec::len));
    let ids = ids.concat().into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
    let labels: Vec<i64> = get("labels")?.flatten_all()?.to_vec1()?;
    let positions = (0..rows).flat_map(|_| 0..cols as u32).collect();
    let mut batch = Batch { rows, cols, ids, positions, segments: vec![0; rows * cols], ..Batch::default() };
    let targets = match classes {
        Some(count) => {
            batch.classes = labels.into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
            Classification { labels: count, separator: None }.targets(&batch)?
        }
        None => {
            batch.labels = labels.into_iter().map(i32::try_from).collect::<Result<_, _>>()?;
            Causal.targets(&batch)?
        }
    };
    Ok((batch, targets))
}

/// PEFT's gradients under the model's own names: they are read as if they were the adapter's tensors.
fn theirs(case: &Case, expected: &BTreeMap<String, Tensor>, scratch: &Path) -> Result<BTreeMap<String, Tensor>> {
    let folder = scratch.join(&case.name);
    std::fs::create_dir_all(&folder)?;
    std::fs::copy(case.path.join(CONFIG_FILE), folder.join(CONFIG_FILE))?;
    let gradients = expected.iter().filter_map(|(key, t)| Some(Entry::of(key.strip_prefix("grad.")?, t)));
    safetensors::write(&folder.join(WEIGHTS_FILE), gradients.collect(), &BTreeMap::new())?;
    let read = case.attach_files(&mut case.model(DType::F32)?, folder::read(&folder)?)?;
    Ok(read.parameters.iter().map(|p| (p.name.clone(), p.tensor.clone())).collect())
}

/// A golden file without labels: the loss is half the mean square of the scores.
fn unlabelled(case: &Case, expected: &BTreeMap<String, Tensor>, tally: &mut Tally) -> Result<()> {
    let uses = case.uses()?;
    let ids = expected.get("ids").context("no ids")?;
    let (rows, cols) = ids.dims2()?;
    let ids = ids.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    let mut model = case.model(DType::F32)?;
    let attached = case.attach(&mut model)?;
    let parameters = attached.parameters.clone();
    let _set = acting(&mut model, attached)?;
    let scores = model.forward(&TokenBatch::new(ids, rows, cols)?, &Flow::eval())?;
    let found = (scores.to_dtype(DType::F32)?.sqr()?.mean_all()? * 0.5)?.backward()?;
    let mut left: BTreeMap<&str, &Tensor> =
        expected.iter().filter_map(|(key, t)| Some((key.strip_prefix("grad.")?, t))).collect();
    for parameter in parameters.trainable() {
        let name = &parameter.name;
        let ours = found.get(&parameter.tensor).with_context(|| format!("{name}: no gradient reaches it"))?;
        let key = left.keys().find(|key| key.ends_with(&format!(".{name}"))).copied();
        let theirs = key.and_then(|key| left.remove(key)).with_context(|| format!("{name}: PEFT has no gradient"))?;
        let error = relative(ours, theirs)?;
        tally.value(format!("{name} of {}", case.name), error);
        tally.cell(uses.clone(), "gradients", error);
    }
    anyhow::ensure!(left.is_empty(), "PEFT has gradients of {:?}, and nothing of these names is trained here", left.keys());
    Ok(())
}

fn one(case: &Case, scratch: &Path, tally: &mut Tally) -> Result<()> {
    let (expected, uses) = (case.expected()?, case.uses()?);
    if !expected.keys().any(|key| key.starts_with("grad.")) {
        tally.count("cases without PEFT's gradients");
        return Ok(());
    }
    if !expected.contains_key("labels") {
        return unlabelled(case, &expected, tally);
    }
    let theirs = theirs(case, &expected, scratch)?;
    let mut model = case.model(DType::F32)?;
    let attached = case.attach(&mut model)?;
    let parameters = attached.parameters.clone();
    let _set = acting(&mut model, attached)?;
    let (batch, targets) = batch(&expected, model.config().labels())?;
    let mut sums = Gradients::new(&parameters);
    let (start, scale) = (Start::of(&model, &parameters, |_| true), 1.0 / targets.weight() as f64);
    let loss = tape::accumulate(&model, &batch, &targets, &Flow::eval(), start, (scale, false), &mut sums)?;
    let (ours, wanted) =
        (loss.value()? * scale, f64::from(expected.get("loss").context("no loss")?.to_vec1::<f32>()?[0]));
    tally.beside(&LOSS, case.name.clone(), (ours - wanted).abs() / wanted);
    tally.cell(uses.clone(), "loss", (ours - wanted).abs() / wanted);
    let mut left: BTreeSet<&str> = theirs.keys().map(String::as_str).collect();
    for (parameter, gradient) in parameters.trainable().zip(sums.sums()) {
        let name = &parameter.name;
        let gradient = gradient.as_ref().with_context(|| format!("{name}: no gradient reaches it"))?;
        let error = relative(gradient, theirs.get(name).with_context(|| format!("{name}: PEFT has no gradient"))?)?;
        tally.value(format!("{name} of {}", case.name), error);
        tally.cell(uses.clone(), "gradients", error);
        left.remove(name.as_str());
    }
    anyhow::ensure!(left.is_empty(), "PEFT has gradients of {left:?}, and nothing of these names is trained here");
    Ok(())
}
