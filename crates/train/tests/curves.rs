//! Twenty AdamW steps from adapters that PEFT initialised: our losses, gradient norms, learning rates and final adapters
//! against PEFT's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{data, golden, tensors, train};
use espalier_adapters::Flow;
use espalier_models::TokenBatch;
use espalier_train::run::metrics::StepRecord;
use espalier_train::{Recipe, Run};
use serde_json::Value;

const LOSS: f64 = 1e-4;
const NORM: f64 = 1e-3;
const LOGITS: f64 = 1e-3;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
}

/// Largest relative difference.
fn relative(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / b.abs().max(1e-12)).fold(0.0, larger)
}

/// The larger difference; one that is no number is larger than any.
fn larger(m: f64, d: f64) -> f64 {
    if d >= 0.0 { m.max(d) } else { f64::INFINITY }
}

fn absolute(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let wide = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let difference = (wide(a) - wide(b)).unwrap();
    difference.abs().unwrap().flatten_all().unwrap().to_vec1().unwrap().into_iter().fold(0.0, larger)
}

fn recipe(folder: &Path, settings: &Value) -> Recipe {
    let number = |key: &str| settings[key].as_f64().unwrap();
    let count = |key: &str| settings[key].as_u64().unwrap() as usize;
    let betas = numbers(&settings["betas"]);
    Recipe {
        model: golden().join(settings["base"].as_str().unwrap()).display().to_string(),
        init_adapter: Some(folder.join("init").display().to_string()),
        data: data(folder.join("data.jsonl")),
        device: std::env::var("ESPALIER_TEST_DEVICE").unwrap_or_else(|_| "cpu".into()),
        dtype: "f32".into(),
        shuffle: false,
        max_steps: Some(count("steps")),
        batch_size: count("batch_size"),
        accumulation: count("accumulate"),
        lr: number("lr"),
        beta1: betas[0],
        beta2: betas[1],
        adam_eps: number("eps"),
        weight_decay: number("weight_decay"),
        schedule: settings["schedule"].as_str().unwrap().into(),
        warmup_steps: Some(count("warmup_steps")),
        max_grad_norm: number("max_grad_norm"),
        ..Recipe::default()
    }
}

fn logits(run: &Run, ids: &Tensor) -> Tensor {
    let rows = ids.to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
    let batch = TokenBatch::new(rows.concat(), rows.len(), rows[0].len()).unwrap();
    run.model.forward(&batch, &Flow::eval()).unwrap().detach().to_device(&Device::Cpu).unwrap()
}

/// The worst differences of one case: losses, norms, logits, adapter tensors.
fn case(name: &str) -> [f64; 4] {
    let folder = golden().join("curves").join(name);
    let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("losses.json")).unwrap()).unwrap();
    let (mut run, seen) = train(recipe(&folder, &expected["settings"]));
    let rates: Vec<f64> = seen.steps.iter().map(|r| r.lr).collect();
    for (ours, theirs) in rates.iter().zip(numbers(&expected["learning_rates"])) {
        assert!((ours - theirs).abs() < 1e-12, "{name}: learning rates {rates:?}");
    }
    let tokens: Vec<f64> = seen.steps.iter().map(|r| r.trained_tokens as f64).collect();
    assert_eq!(tokens, numbers(&expected["tokens"]), "{name}: labelled tokens");
    let norms: Vec<f64> = seen.steps.iter().map(|r| r.grad_norm.unwrap()).collect();
    // PEFT's loss holds the penalties of a method at their weights; ours are beside it.
    let settings = std::fs::read(folder.join("init/adapter_config.json")).unwrap();
    let settings: Value = serde_json::from_slice(&settings).unwrap();
    let whole = |record: &StepRecord| {
        let penalty = record.extra.get("orthogonality").and_then(Value::as_f64);
        assert_eq!(penalty.is_some(), settings.get("orth_reg_weight").is_some(), "{name}: penalty");
        record.loss + penalty.map_or(0.0, |p| p * settings["orth_reg_weight"].as_f64().unwrap())
    };
    let losses: Vec<f64> = seen.steps.iter().map(whole).collect();
    let losses = relative(&losses, &numbers(&expected["losses"]));
    let norms = relative(&norms, &numbers(&expected["grad_norms"]));
    let probe = tensors(&folder.join("expected.safetensors"));
    let scores = absolute(&logits(&run, &probe["ids"]), &probe["logits"]);

    let saved = tempfile::tempdir().unwrap();
    run.save_adapter(saved.path()).unwrap();
    let ours = tensors(&saved.path().join("adapter_model.safetensors"));
    let theirs = tensors(&folder.join("final/adapter_model.safetensors"));
    assert!(ours.keys().eq(theirs.keys()), "{name}: {:?} against {:?}", ours.keys(), theirs.keys());
    let weights = ours.iter().map(|(key, t)| absolute(t, &theirs[key])).fold(0.0, larger);
    eprintln!("{name:20} loss {losses:.1e}  norm {norms:.1e}  logits {scores:.1e}  adapter {weights:.1e}");
    [losses, norms, scores, weights]
}

#[test]
fn twenty_steps_give_pefts_curves_and_adapters() {
    let mut names: Vec<String> = std::fs::read_dir(golden().join("curves"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names.len(), 12, "{names:?}");
    let mut wrong = Vec::new();
    for name in &names {
        let worst = case(name);
        // NaN must not pass.
        let fits = worst.iter().zip([LOSS, NORM, LOGITS, LOGITS]).all(|(found, limit)| *found <= limit);
        if !fits {
            wrong.push(format!("{name}: loss, norm, logits, adapter {worst:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The comparison notices what it must: a slightly wrong decay is no longer PEFT's curve.
#[test]
fn another_setting_is_another_curve() {
    let folder = golden().join("curves/llama_lora");
    let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("losses.json")).unwrap()).unwrap();
    let right = recipe(&folder, &expected["settings"]);
    for wrong in [Recipe { lr: 1.9e-3, ..right.clone() }, Recipe { beta2: 0.99, ..right }] {
        let (_, seen) = train(wrong);
        assert!(relative(&seen.losses(), &numbers(&expected["losses"])) > LOSS);
    }
}
