//! Every family against transformers: scores, long sequences, padding, gradients, and the cache against the whole pass.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::path::Path;

use candle_core::{DType, IndexOp, Tensor};
use common::{batch, device, difference, golden, load, logits, rows, tensors};
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, MethodConfig};
use espalier_kernels::cross_entropy::cross_entropy;
use espalier_models::input::PADDING;
use espalier_models::{LoadOptions, Model, TokenBatch};

const TOLERANCE: f64 = 1e-4;

const FAMILIES: &[&str] = &[
    "llama1",
    "llama_gqa_tied",
    "llama3_rope",
    "llama_linear",
    "llama_dynamic",
    "llama_yarn",
    "llama_bias",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "phi3_longrope",
    "phi3_partial",
    "gemma2",
    "gpt2",
    "bert",
    "roberta",
];

fn check(name: &str, what: &str, ours: &Tensor, theirs: &Tensor, worst: &mut Vec<String>) {
    let d = difference(ours, theirs);
    eprintln!("{name:16} {what:12} {d:.2e}");
    if d.is_nan() || d > TOLERANCE {
        worst.push(format!("{name} {what}: {d:.3e}"));
    }
}

fn compare(name: &str, folder: &Path, failures: &mut Vec<String>) {
    let expected = tensors(&golden().join("families").join(name).join("expected.safetensors"));
    let model = load(folder);
    check(name, "logits", &logits(&model, &expected["ids"]), &expected["logits"], failures);
    if let Some(ids) = expected.get("ids_long") {
        check(name, "logits_long", &logits(&model, ids), &expected["logits_long"], failures);
    }
    if let Some(ids) = expected.get("ids_pad") {
        let mask = rows(&expected["mask_pad"]);
        let mut input = batch(ids);
        input.segments = Some(mask.concat().into_iter().map(|m| if m == 0 { PADDING } else { 0 }).collect());
        let ours = model.forward(&input, &Flow::eval()).unwrap();
        check(name, "logits_pad", &ours, &expected["logits_pad"], failures);
    }
    if let Some(types) = expected.get("type_ids") {
        let mut input = batch(&expected["ids"]);
        input.token_types = Some(rows(types).concat());
        let ours = model.forward(&input, &Flow::eval()).unwrap();
        check(name, "logits_types", &ours, &expected["logits_types"], failures);
    }
}

#[test]
fn scores_equal_transformers() {
    let mut failures = Vec::new();
    for name in FAMILIES {
        compare(name, &golden().join("families").join(name), &mut failures);
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn older_config_files_give_the_same_models() {
    let mut failures = Vec::new();
    for name in FAMILIES {
        let folder = golden().join("families").join(name);
        let temp = tempfile::tempdir().unwrap();
        std::fs::copy(folder.join("config.v4.json"), temp.path().join("config.json")).unwrap();
        std::fs::copy(folder.join("model.safetensors"), temp.path().join("model.safetensors")).unwrap();
        compare(name, temp.path(), &mut failures);
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn bf16_stays_within_its_rounding() {
    for name in FAMILIES {
        let folder = golden().join("families").join(name);
        let expected = tensors(&folder.join("expected.safetensors"));
        let options = LoadOptions { dtype: DType::BF16, ..LoadOptions::cpu() };
        let model = Model::load(&folder, &options).unwrap();
        let ours = logits(&model, &expected["ids"]);
        let scale =
            expected["logits"].abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        let d = difference(&ours, &expected["logits"]) / f64::from(scale);
        eprintln!("{name:16} bf16 relative {d:.2e}");
        // Eight bits of mantissa (4e-3) through two blocks of sharpened attention.
        assert!(d < 0.15, "{name}: {d}");
    }
}

#[test]
fn gradients_equal_transformers() {
    for name in ["llama_gqa_tied", "gpt2"] {
        let folder = golden().join("families").join(name);
        let expected = tensors(&folder.join("expected.safetensors"));
        let mut model = load(&folder);
        let wanted: Vec<&str> = expected.keys().filter_map(|k| k.strip_prefix("grad.")).collect();
        let modules: Vec<String> =
            wanted.iter().map(|n| n.trim_end_matches(".weight").trim_end_matches(".bias").to_owned()).collect();
        let config =
            AdapterConfig { modules_to_save: modules, ..AdapterConfig::new(MethodConfig::by_name("lora").unwrap()) };
        let attached = attach(&mut model, &config, Origin::Seed(0), DType::F32, &device()).unwrap();
        let parameters = attached.parameters.clone();
        let mut set = AdapterSet::new();
        set.add("a", attached).unwrap();
        set.activate(&mut model, &[("a", 1.0)]).unwrap();
        let scores = model.forward(&batch(&expected["ids"]), &Flow::eval()).unwrap();
        let (b, t, v) = scores.dims3().unwrap();
        let labels = expected["labels"].to_vec2::<i64>().unwrap();
        let labels: Vec<i64> = labels.iter().flat_map(|row| row[1..].to_vec()).collect();
        let weights: Vec<f32> = labels.iter().map(|l| if *l < 0 { 0.0 } else { 1.0 }).collect();
        let count = f64::from(weights.iter().sum::<f32>());
        let labels: Vec<u32> = labels.iter().map(|l| (*l).max(0) as u32).collect();
        let shifted = scores.i((.., ..t - 1)).unwrap().reshape((b * (t - 1), v)).unwrap();
        let loss = (cross_entropy(&shifted, &labels, Some(&weights)).unwrap().sum_all().unwrap() / count).unwrap();
        let theirs = expected["loss"].to_vec1::<f32>().unwrap()[0];
        assert!((loss.to_scalar::<f32>().unwrap() - theirs).abs() < 1e-4);
        let grads = loss.backward().unwrap();
        for parameter in wanted {
            let ours = &parameters.get(parameter).unwrap_or_else(|| panic!("{parameter}")).tensor;
            let gradient = grads.get(ours).unwrap().clone();
            let theirs = &expected[&format!("grad.{parameter}")];
            let gradient = if gradient.dims() == theirs.dims() { gradient } else { gradient.t().unwrap() };
            let d = difference(&gradient, theirs);
            eprintln!("{name} {parameter} {d:.2e}");
            assert!(d < TOLERANCE, "{name} {parameter}: {d}");
        }
    }
}

#[test]
fn the_cache_gives_the_scores_of_the_whole_pass() {
    for name in FAMILIES.iter().filter(|n| !["bert", "roberta"].contains(n)) {
        let folder = golden().join("families").join(name);
        let expected = tensors(&folder.join("expected.safetensors"));
        let model = load(&folder);
        let ids = rows(
            expected
                .get("ids_long")
                .filter(|_| !name.contains("dynamic") && !name.contains("longrope"))
                .unwrap_or(&expected["ids"]),
        );
        let length = ids[0].len();
        let whole = logits(&model, &Tensor::new(ids.clone(), model.device()).unwrap());
        for chunk in [1, 5] {
            let mut cache = model.new_cache();
            let mut at = 0;
            while at < length {
                let end = (at + chunk).min(length);
                let part: Vec<u32> = ids.iter().flat_map(|row| row[at..end].to_vec()).collect();
                let input = TokenBatch::starting_at(part, ids.len(), end - at, at).unwrap();
                let last = model.advance(&input, &mut cache, &Flow::eval()).unwrap();
                let d = difference(&last, &whole.i((.., end - 1)).unwrap());
                assert!(d < TOLERANCE, "{name} chunk {chunk} at {end}: {d}");
                at = end;
            }
        }
    }
}

#[test]
fn padding_and_packing_do_not_leak() {
    let folder = golden().join("families/mistral");
    let model = load(&folder);
    let (a, b): (Vec<u32>, Vec<u32>) = (vec![3, 9, 27, 17, 5], vec![4, 8, 16]);
    let alone = |ids: &[u32]| {
        let input = TokenBatch::new(ids.to_vec(), 1, ids.len()).unwrap();
        model.forward(&input, &Flow::eval()).unwrap()
    };
    let (alone_a, alone_b) = (alone(&a), alone(&b));
    let padded = model.forward(&TokenBatch::padded(&[a.clone(), b.clone()], 0).unwrap(), &Flow::eval()).unwrap();
    assert!(difference(&padded.i((1..2, ..3)).unwrap(), &alone_b) < 1e-5);
    let packed = TokenBatch {
        batch: 1,
        length: 8,
        ids: [a.clone(), b].concat(),
        positions: vec![0, 1, 2, 3, 4, 0, 1, 2],
        segments: Some(vec![0, 0, 0, 0, 0, 1, 1, 1]),
        token_types: None,
    };
    let packed = model.forward(&packed, &Flow::eval()).unwrap();
    assert!(difference(&packed.i((.., ..5)).unwrap(), &alone_a) < 1e-5);
    assert!(difference(&packed.i((.., 5..)).unwrap(), &alone_b) < 1e-5);
    // A change in one segment leaves the other bit for bit.
    let changed = TokenBatch {
        batch: 1,
        length: 8,
        ids: [a, vec![4, 8, 17]].concat(),
        positions: vec![0, 1, 2, 3, 4, 0, 1, 2],
        segments: Some(vec![0, 0, 0, 0, 0, 1, 1, 1]),
        token_types: None,
    };
    let changed = model.forward(&changed, &Flow::eval()).unwrap();
    assert_eq!(difference(&packed.i((.., ..5)).unwrap(), &changed.i((.., ..5)).unwrap()), 0.0);
}
