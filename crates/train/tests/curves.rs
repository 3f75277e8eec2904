//! Twenty steps of AdamW from an adapter that PEFT initialised: the losses, gradient norms and final scores of PEFT.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::Flow;
use espalier_adapters::formats::safetensors::MappedFile;
use espalier_models::TokenBatch;
use espalier_train::observer::Observer;
use espalier_train::recipe::values::{DataList, DataSource};
use espalier_train::run::metrics::StepRecord;
use espalier_train::{Recipe, Run};
use serde_json::Value;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden")
}

#[derive(Default)]
struct Records(Vec<StepRecord>);

impl Observer for Records {
    fn step(&mut self, record: &StepRecord) -> espalier_train::Result<()> {
        self.0.push(record.clone());
        Ok(())
    }
}

fn recipe(case: &Path, settings: &Value) -> Recipe {
    let number = |key: &str| settings[key].as_f64().unwrap_or_default();
    let data = case.join("data.jsonl").display().to_string();
    Recipe {
        model: golden().join(settings["base"].as_str().unwrap()).display().to_string(),
        init_adapter: Some(case.join("init").display().to_string()),
        data: DataList(vec![DataSource { path: data, weight: None }]),
        batch_size: settings["batch_size"].as_u64().unwrap() as usize,
        accumulation: settings["accumulate"].as_u64().unwrap_or(1) as usize,
        max_steps: settings["steps"].as_u64().map(|n| n as usize),
        lr: number("lr"),
        beta1: settings["betas"][0].as_f64().unwrap(),
        beta2: settings["betas"][1].as_f64().unwrap(),
        adam_eps: number("eps"),
        weight_decay: number("weight_decay"),
        schedule: settings["schedule"].as_str().unwrap_or("constant").to_owned(),
        warmup_steps: Some(settings["warmup_steps"].as_u64().unwrap_or(0) as usize),
        max_grad_norm: number("max_grad_norm"),
        shuffle: false,
        device: "cpu".into(),
        dtype: "f32".into(),
        ..Recipe::default()
    }
}

fn logits(run: &Run, ids: &Tensor) -> Tensor {
    let rows = ids.to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
    let (b, t) = (rows.len(), rows[0].len());
    let ids = rows.concat().into_iter().map(|id| id as u32).collect();
    run.model.forward(&TokenBatch::new(ids, b, t).unwrap(), &Flow::eval()).unwrap().detach()
}

fn worst(ours: impl Iterator<Item = f64>, theirs: &Value) -> f64 {
    let theirs = theirs.as_array().unwrap();
    let ours: Vec<f64> = ours.collect();
    assert_eq!(ours.len(), theirs.len());
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b.as_f64().unwrap()).abs() / b.as_f64().unwrap().abs().max(1e-9))
        .fold(0.0, f64::max)
}

fn follows(name: &str, checkpointing: bool) {
    let case = golden().join("curves").join(name);
    let expected: Value = serde_json::from_str(&std::fs::read_to_string(case.join("losses.json")).unwrap()).unwrap();
    let recipe = Recipe { checkpointing, ..recipe(&case, &expected["settings"]) };
    let mut run = Run::prepare(recipe).unwrap();
    let mut records = Records::default();
    run.train(None, false, &mut records, &AtomicBool::new(false)).unwrap();
    let loss = worst(records.0.iter().map(|r| r.loss), &expected["losses"]);
    let norm = worst(records.0.iter().map(|r| r.grad_norm.unwrap()), &expected["grad_norms"]);
    let golden = MappedFile::open(&case.join("expected.safetensors")).unwrap();
    let (ids, theirs) = (golden.load("ids", &Device::Cpu).unwrap(), golden.load("logits", &Device::Cpu).unwrap());
    let difference = (logits(&run, &ids) - theirs).unwrap().abs().unwrap().flatten_all().unwrap();
    let scores = difference.max(0).unwrap().to_scalar::<f32>().unwrap();
    eprintln!("{name:20} loss {loss:.1e} gradient norm {norm:.1e} final scores {scores:.1e}");
    assert!(loss < 1e-4, "{name}: losses differ by {loss:.2e} relative");
    assert!(norm < 1e-3, "{name}: gradient norms differ by {norm:.2e} relative");
    assert!(scores < 1e-3, "{name}: final scores differ by {scores:.2e}");
}

macro_rules! cases {
    ($($name:ident),*) => { $(#[test] fn $name() { follows(stringify!($name), false); })* };
}

cases!(
    llama_lora,
    llama_rslora,
    llama_dora,
    llama_lora_padded,
    llama_lora_sched,
    gpt2_lora,
    gpt2_dora,
    phi3_lora,
    phi3_dora
);

#[test]
fn recomputing_blocks_changes_nothing() {
    follows("llama_lora", true);
    follows("gpt2_dora", true);
}
