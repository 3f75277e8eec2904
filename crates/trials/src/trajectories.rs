//! fifty steps give the curve that PEFT and TRL give.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::Flow;
use espalier_models::TokenBatch;
use espalier_train::Recipe;
use espalier_train::run::metrics::StepRecord;
use serde::Deserialize;

use crate::golden::{self, listed, name_of};
use crate::runs::{self, data};
use crate::subject::{difference, largest};
use crate::{Limit, Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-03",
    title: "Fifty steps against PEFT and TRL",
    claim: "Fifty AdamW steps from an adapter that PEFT initialised, on the same rows in the same order in f32 on the CPU, \
            give the losses of torch and PEFT (with transformers' schedules) and of TRL's SFTTrainer: LoRA, rank-stabilised \
            LoRA and DoRA on three families, prompt and prefix tuning, and AdaLoRA with its penalty before it prunes; rows of \
            equal and unequal length, accumulation, clipping, warm-up and cosine. \
            Learning rates and labelled tokens are the same at each step. Every folder of `parity/golden/curves`; another \
            learning rate is seen.",
    unit: "largest |difference of a step's loss|",
    bar: 1e-3,
    bounded: 550,
    full: 550,
    run,
};

const MEAN: Limit = Limit { unit: "largest mean |difference of losses| of a run", bar: 1e-5 };
const NORM: Limit = Limit { unit: "largest relative difference of a gradient's norm", bar: 1e-3 };
const FINAL: Limit = Limit { unit: "largest |difference of logits and tensors| of a trained adapter", bar: 1e-3 };

/// What the reference did.
#[derive(Debug, Deserialize)]
struct Curve {
    settings: Settings,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    /// Absent where the trainer keeps none.
    learning_rates: Option<Vec<f64>>,
    tokens: Option<Vec<u64>>,
}

#[derive(Debug, Deserialize)]
struct Settings {
    base: String,
    steps: usize,
    batch_size: usize,
    accumulate: usize,
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    schedule: String,
    warmup_steps: usize,
    max_grad_norm: f64,
    /// Whose trainer it was, where it was not the loop of `parity/curves.py`.
    made_by: Option<String>,
}

/// The recipe of a run; on the CPU, or where `ESPALIER_TEST_DEVICE` says.
fn recipe(folder: &Path, settings: &Settings) -> Recipe {
    Recipe {
        model: golden::folder().join(&settings.base).display().to_string(),
        init_adapter: Some(folder.join("init").display().to_string()),
        data: data(&folder.join("data.jsonl")),
        device: std::env::var("ESPALIER_TEST_DEVICE").unwrap_or_else(|_| "cpu".into()),
        dtype: "f32".into(),
        shuffle: false,
        max_steps: Some(settings.steps),
        batch_size: settings.batch_size,
        accumulation: settings.accumulate,
        lr: settings.lr,
        beta1: settings.betas.0,
        beta2: settings.betas.1,
        adam_eps: settings.eps,
        weight_decay: settings.weight_decay,
        schedule: settings.schedule.clone(),
        warmup_steps: Some(settings.warmup_steps),
        max_grad_norm: settings.max_grad_norm,
        ..Recipe::default()
    }
}

fn read(folder: &Path) -> Result<Curve> {
    Ok(serde_json::from_str(&std::fs::read_to_string(folder.join("losses.json"))?)?)
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let folders = listed(&golden::folder().join("curves"))?;
    for folder in &folders {
        one(folder, scope.scratch, tally).with_context(|| name_of(folder))?;
    }
    another_rate_is_seen(folders.first().context("no curves")?)
}

fn one(folder: &Path, scratch: &Path, tally: &mut Tally) -> Result<()> {
    let (name, curve) = (name_of(folder), read(folder)?);
    let (mut run, steps) = runs::train(recipe(folder, &curve.settings))?;
    anyhow::ensure!(steps.len() == curve.losses.len() && steps.len() == curve.settings.steps, "{} steps", steps.len());
    if let Some(rates) = &curve.learning_rates {
        let off = largest(steps.iter().zip(rates).map(|(step, rate)| step.lr - rate));
        anyhow::ensure!(off < 1e-12 && rates.len() == steps.len(), "learning rates differ by {off}");
    }
    if let Some(tokens) = &curve.tokens {
        let ours: Vec<u64> = steps.iter().map(|step| step.trained_tokens).collect();
        anyhow::ensure!(ours == *tokens, "labelled tokens {ours:?}");
    }
    tally.count(format!("runs of {}", curve.settings.made_by.as_deref().unwrap_or("torch and PEFT")));
    let errors = errors(&whole_losses(folder, &steps)?, &curve.losses);
    for (i, error) in errors.iter().enumerate() {
        tally.value(format!("step {} of {name}", i + 1), *error);
    }
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    let norms = steps.iter().zip(&curve.grad_norms).map(|(s, n)| (s.grad_norm.unwrap_or(f64::NAN) - n) / n);
    let norms = largest(norms);
    tally.beside(&MEAN, name.clone(), mean);
    tally.beside(&NORM, name.clone(), norms);
    tally.cell(name.clone(), "max |Δloss|", largest(errors));
    tally.cell(name.clone(), "mean |Δloss|", mean);
    tally.cell(name.clone(), "Δnorm / norm", norms);

    let probe = golden::tensors(&folder.join("expected.safetensors"))?;
    let rows: Vec<Vec<i64>> = probe.get("ids").context("no ids")?.to_vec2()?;
    let ids = rows.concat().into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
    let batch = TokenBatch::new(ids, rows.len(), rows.first().map_or(0, Vec::len))?;
    let on_cpu = |t: Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let logits = on_cpu(run.model.forward(&batch, &Flow::eval())?.detach())?;
    let mut trained = difference(&logits, probe.get("logits").context("no logits")?)?;
    let saved = scratch.join(&name);
    run.save_adapter(&saved)?;
    let (ours, theirs) = (weights(&saved)?, weights(&folder.join("final"))?);
    anyhow::ensure!(ours.keys().eq(theirs.keys()), "{:?} against {:?}", ours.keys(), theirs.keys());
    for (tensor, other) in ours.values().zip(theirs.values()) {
        trained = trained.max(difference(tensor, other)?);
    }
    tally.beside(&FINAL, name.clone(), trained);
    tally.cell(name, "trained adapter", trained);
    Ok(())
}

fn weights(folder: &Path) -> Result<std::collections::BTreeMap<String, Tensor>> {
    golden::tensors(&folder.join(espalier_adapters::formats::folder::WEIGHTS_FILE))
}

/// Losses as the reference counts them: those of PEFT hold a method's penalty at its weight, which is beside ours.
fn whole_losses(folder: &Path, steps: &[StepRecord]) -> Result<Vec<f64>> {
    let settings = std::fs::read(folder.join("init").join(espalier_adapters::formats::folder::CONFIG_FILE))?;
    let settings: serde_json::Value = serde_json::from_slice(&settings)?;
    let weight = settings.get("orth_reg_weight").and_then(serde_json::Value::as_f64);
    let whole = |step: &StepRecord| {
        let penalty = step.extra.get("orthogonality").and_then(serde_json::Value::as_f64);
        anyhow::ensure!(penalty.is_some() == weight.is_some(), "a penalty of {penalty:?} at the weight {weight:?}");
        Ok(step.loss + penalty.zip(weight).map_or(0.0, |(penalty, weight)| penalty * weight))
    };
    steps.iter().map(whole).collect()
}

fn errors(ours: &[f64], losses: &[f64]) -> Vec<f64> {
    ours.iter().zip(losses).map(|(our, loss)| (our - loss).abs()).collect()
}

/// The comparison sees what it must: with a rate five per cent lower it is no longer the same curve.
fn another_rate_is_seen(folder: &Path) -> Result<()> {
    let curve = read(folder)?;
    let right = recipe(folder, &curve.settings);
    let (_, steps) = runs::train(Recipe { lr: 0.95 * right.lr, ..right })?;
    let seen = largest(errors(&whole_losses(folder, &steps)?, &curve.losses));
    anyhow::ensure!(seen > TRIAL.bar, "another learning rate changes losses by {seen} only");
    Ok(())
}
