//! The tape against finite differences in f64, with and without recomputation, and what must not change a run: how rows
//! are cut into batches.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{family, lora, recipe, train, write_rows};
use espalier_adapters::adapter::Reach;
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::target::{Pattern, TargetSpec};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, MethodConfig, ParameterMap};
use espalier_data::Batch;
use espalier_models::{LoadOptions, Model};
use espalier_train::objective::Targets;
use espalier_train::optimizer::global_norm;
use espalier_train::tape::{self, Gradients, Start};
use espalier_train::{Recipe, Run};

const STEP: f64 = 1e-5;

/// Three rows, of which two are padded, with holes in what is trained.
fn causal() -> (Batch, Targets) {
    let rows: [&[u32]; 3] = [&[5, 9, 33, 60, 7, 12, 40], &[1, 2, 3, 50, 61], &[44, 8, 20, 21, 22, 23]];
    let (cols, pad) = (7, espalier_data::PADDING);
    let mut batch = Batch { rows: rows.len(), cols, ..Batch::default() };
    let mut targets = Targets::default();
    for (i, row) in rows.iter().enumerate() {
        for j in 0..cols {
            let there = j < row.len();
            batch.ids.push(if there { row[j] } else { 0 });
            batch.positions.push(if there { j as u32 } else { 0 });
            batch.segments.push(if there { 0 } else { pad });
            if there && j > 0 && (i + j) % 4 != 0 {
                targets.places.push((i * cols + j - 1) as u32);
                targets.labels.push(row[j]);
            }
        }
    }
    (batch, targets)
}

fn classes() -> (Batch, Targets) {
    let (batch, _) = causal();
    let places = (0..batch.rows).map(|i| (i * batch.cols) as u32).collect();
    (batch, Targets { places, labels: vec![1, 0, 1], separator: None })
}

struct Setting {
    model: Model,
    parameters: ParameterMap,
    // Keeps the layers.
    _adapters: AdapterSet,
}

/// A golden model in `dtype` with an adapter whose values are all moved off their first ones, so that no gradient is 0.
fn setting(base: &str, config: &AdapterConfig, dtype: DType) -> Setting {
    let options = LoadOptions { dtype, ..LoadOptions::cpu() };
    let mut model = Model::load(Path::new(&family(base)), &options).unwrap();
    let attached = attach(&mut model, config, Origin::Seed(3), dtype, &Device::Cpu).unwrap();
    let parameters = attached.parameters.clone();
    for (k, parameter) in parameters.trainable().enumerate() {
        let noise: Vec<f64> =
            (0..parameter.tensor.elem_count()).map(|i| 0.05 * ((i * 7 + k * 13) as f64 * 0.61).sin()).collect();
        let noise = Tensor::from_vec(noise, parameter.tensor.shape(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        parameter.var().unwrap().set(&(&parameter.tensor + noise).unwrap().detach()).unwrap();
    }
    let mut adapters = AdapterSet::new();
    adapters.add("it", attached).unwrap();
    adapters.activate(&mut model, &[("it", 1.0)]).unwrap();
    Setting { model, parameters, _adapters: adapters }
}

fn gradients(s: &Setting, input: &(Batch, Targets), flow: &Flow, checkpointing: bool) -> (f64, Vec<Tensor>) {
    let mut sums = Gradients::new(&s.parameters);
    let start = Start::of(&s.model, &s.parameters, |_| true);
    let scale = 1.0 / input.1.weight() as f64;
    let loss = tape::accumulate(&s.model, &input.0, &input.1, flow, start, (scale, checkpointing), &mut sums).unwrap();
    let loss = loss.value().unwrap();
    let all = sums.sums().iter().zip(s.parameters.trainable());
    let all = all.map(|(g, p)| g.clone().unwrap_or_else(|| panic!("no gradient reaches {}", p.name))).collect();
    (loss * scale, all)
}

fn loss(s: &Setting, input: &(Batch, Targets)) -> f64 {
    tape::evaluate(&s.model, &input.0, &input.1).unwrap() / input.1.weight() as f64
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Some values of every trained tensor, moved one at a time.
fn differences_agree(base: &str, config: &AdapterConfig, input: &(Batch, Targets)) {
    let s = setting(base, config, DType::F64);
    let (mean, grads) = gradients(&s, input, &Flow::eval(), false);
    assert!((mean - loss(&s, input)).abs() < 1e-12, "{base}: the loss of the tape is not the loss");
    let largest = grads.iter().flat_map(flat).fold(0.0f64, |m, g| m.max(g.abs()));
    assert!(largest > 1e-3, "{base}: all gradients are small");
    let mut checked = 0;
    // DoRA holds the norm of W + B A fixed in the backward pass (arXiv 2402.09353, section 4.3), so the gradients of A and B are
    // not derivatives of the loss. Theirs are checked with the gain held fixed (`kernels/tests/part.rs`) and against PEFT's.
    let held = |name: &str| config.method.name() == "dora" && name.contains("lora_") && !name.contains("magnitude");
    for (gradient, parameter) in grads.iter().zip(s.parameters.trainable()).filter(|(_, p)| !held(&p.name)) {
        let (gradient, values) = (flat(gradient), flat(&parameter.tensor));
        let top = (0..gradient.len()).max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs())).unwrap();
        assert!(gradient[top] != 0.0, "{base}: {} has no gradient", parameter.name);
        let at = |index: usize, delta: f64| {
            let mut moved = values.clone();
            moved[index] += delta;
            let tensor = Tensor::from_vec(moved, parameter.tensor.shape(), &Device::Cpu).unwrap();
            parameter.var().unwrap().set(&tensor).unwrap();
            loss(&s, input)
        };
        for index in [top, 0, values.len() / 2, values.len() - 1] {
            let numeric = (at(index, STEP) - at(index, -STEP)) / (2.0 * STEP);
            let (a, b) = (gradient[index], numeric);
            let wrong = (a - b).abs() / (a.abs().max(b.abs()) + 1e-4 * largest);
            assert!(wrong < 1e-4, "{base}, {} [{index}]: {a:e} against {b:e}", parameter.name);
            checked += 1;
        }
        at(0, 0.0);
    }
    let meant = s.parameters.trainable().filter(|p| !held(&p.name)).count();
    assert!(checked == 4 * meant && meant > 0, "{base}: {checked} values of {meant} tensors");
}

fn method(name: &str) -> AdapterConfig {
    AdapterConfig::new(MethodConfig::by_name(name).unwrap())
}

/// An adapter, and beside it whatever else can be trained.
fn with_dense(name: &str, whole: &[&str]) -> AdapterConfig {
    AdapterConfig {
        bias: serde_json::from_value(serde_json::json!("all")).unwrap(),
        modules_to_save: whole.iter().map(|s| (*s).to_owned()).collect(),
        ..method(name)
    }
}

#[test]
fn gradients_of_lora_and_dora_equal_finite_differences() {
    for base in ["llama_gqa_tied", "gpt2", "gemma2", "phi3", "qwen3"] {
        for name in ["lora", "dora"] {
            differences_agree(base, &method(name), &causal());
        }
    }
}

#[test]
fn gradients_of_classifiers_equal_finite_differences() {
    for base in ["bert", "roberta"] {
        differences_agree(base, &with_dense("lora", &["classifier"]), &classes());
    }
}

#[test]
fn gradients_of_embeddings_norms_and_biases_equal_finite_differences() {
    differences_agree("gpt2", &with_dense("lora", &["wte", "ln_f"]), &causal());
    differences_agree("llama_gqa_tied", &with_dense("dora", &["embed_tokens", "input_layernorm"]), &causal());
    differences_agree("llama1", &with_dense("lora", &["lm_head"]), &causal());
}

#[test]
fn gradients_of_a_tied_head_equal_finite_differences() {
    let targets = serde_json::from_value(serde_json::json!({"target_modules": ["embed_tokens", "q_proj"]})).unwrap();
    for tie_weights in [true, false] {
        // The head shares the table's factors, or stays as it is.
        let config = AdapterConfig { targets: Clone::clone(&targets), tie_weights, ..method("lora") };
        differences_agree("llama_gqa_tied", &config, &causal());
        // One tensor for both, or one each.
        let pair = AdapterConfig { tie_weights, ..with_dense("lora", &["embed_tokens", "lm_head"]) };
        differences_agree("llama_gqa_tied", &pair, &causal());
    }
}

#[test]
fn recomputing_blocks_changes_no_bit() {
    for (base, name) in [("llama_gqa_tied", "lora"), ("gpt2", "dora"), ("gemma2", "lora")] {
        let mut config = method(name);
        let mut json = serde_json::to_value(&config.method).unwrap();
        json["dropout"] = 0.3.into();
        config.method = serde_json::from_value(json).unwrap();
        let s = setting(base, &config, DType::F32);
        let flow = Flow::train(5, 2, 1);
        let (kept, again) = (gradients(&s, &causal(), &flow, false), gradients(&s, &causal(), &flow, true));
        assert_eq!(kept.0.to_bits(), again.0.to_bits(), "{base}");
        for (a, b) in kept.1.iter().zip(&again.1) {
            assert_eq!(flat(a), flat(b), "{base}");
        }
        // Dropout was there: another step draws another mask.
        let (other, _) = gradients(&s, &causal(), &Flow::train(5, 3, 1), false);
        assert_ne!(kept.0.to_bits(), other.to_bits(), "{base}");
    }
}

#[test]
fn recording_starts_at_the_first_trained_block() {
    let only = |layer: i64| {
        let mut config = method("lora");
        let mut targets = serde_json::to_value(&config.targets).unwrap();
        targets["layers_to_transform"] = layer.into();
        config.targets = serde_json::from_value::<TargetSpec>(targets).unwrap();
        config
    };
    for layer in 0..2 {
        let s = setting("llama_gqa_tied", &only(layer), DType::F64);
        assert_eq!(Start::of(&s.model, &s.parameters, |_| true), Start::Block(layer as usize));
        differences_agree("llama_gqa_tied", &only(layer), &causal());
    }
    let config = AdapterConfig {
        targets: TargetSpec { target_modules: Pattern::Endings(vec!["lm_head".into()]), ..TargetSpec::default() },
        ..method("lora")
    };
    let s = setting("llama1", &config, DType::F64);
    assert_eq!(Start::of(&s.model, &s.parameters, |_| true), Start::Block(s.model.blocks()));
    differences_agree("llama1", &config, &causal());
}

#[test]
fn gradients_add_up_over_passes() {
    let s = setting("llama_gqa_tied", &method("lora"), DType::F64);
    let (input, flow) = (causal(), Flow::eval());
    let (_, once) = gradients(&s, &input, &flow, false);
    let mut sums = Gradients::new(&s.parameters);
    let start = Start::of(&s.model, &s.parameters, |_| true);
    let scale = 0.5 / input.1.weight() as f64;
    for _ in 0..2 {
        let _ = tape::accumulate(&s.model, &input.0, &input.1, &flow, start, (scale, false), &mut sums).unwrap();
    }
    let difference = (global_norm(sums.sums()).unwrap()
        - global_norm(&once.iter().cloned().map(Some).collect::<Vec<_>>()).unwrap())
    .abs();
    assert!(difference < 1e-9);
    sums.clear();
    assert!(sums.sums().iter().all(Option::is_none));
}

fn close(name: &str, ours: &[f64], theirs: &[f64], limit: f64) {
    assert_eq!(ours.len(), theirs.len(), "{name}");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() / b.abs() < limit, "{name}, step {}: {a} against {b}", i + 1);
    }
}

#[test]
fn how_rows_are_cut_into_batches_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    for adapter in [lora(4, 0.0), "method = 'dora'\nr = 2".parse().unwrap()] {
        let of = |batch_size: usize, accumulation: usize| {
            train(Recipe {
                batch_size,
                accumulation,
                max_steps: Some(8),
                adapter: adapter.clone(),
                ..recipe(&rows, dir.path())
            })
            .1
        };
        let one = of(8, 1);
        assert!(one.losses()[7] < one.losses()[0], "{:?}", one.losses());
        let packed = train(Recipe {
            packing: true,
            max_length: 100,
            batch_size: 1,
            max_steps: Some(8),
            adapter: adapter.clone(),
            ..recipe(&rows, dir.path())
        })
        .1;
        for (name, seen) in [("4 x 2", of(4, 2)), ("2 x 4", of(2, 4)), ("1 x 8", of(1, 8)), ("packed", packed)] {
            close(name, &seen.losses(), &one.losses(), 1e-5);
            let norms = |w: &common::Watcher<'_>| w.steps.iter().map(|r| r.grad_norm.unwrap()).collect::<Vec<_>>();
            close(name, &norms(&seen), &norms(&one), 1e-4);
            for (a, b) in seen.steps.iter().zip(&one.steps) {
                assert_eq!((a.tokens, a.trained_tokens), (b.tokens, b.trained_tokens), "{name}");
            }
        }
        // Eight single steps are another run.
        assert!((of(1, 1).losses()[1] - one.losses()[1]).abs() > 1e-3);
    }
}

/// Sum of losses and number of targets of some rows of an untrained run.
fn weigh(run: &Run, batches: std::ops::Range<usize>) -> (f64, usize) {
    batches.fold((0.0, 0), |(sum, weight), i| {
        let batch = run.data.train.batch(0, i).unwrap();
        let targets = run.objective.targets(&batch).unwrap();
        (sum + tape::evaluate(&run.model, &batch, &targets).unwrap(), weight + targets.weight())
    })
}

#[test]
fn the_last_window_of_an_epoch_weighs_what_is_left_by_its_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 10);
    // Nothing moves, so that every step can be computed from the first model.
    let recipe =
        Recipe { batch_size: 2, accumulation: 2, lr: 0.0, max_steps: None, epochs: 2.0, ..recipe(&rows, dir.path()) };
    let (run, seen) = train(recipe);
    assert_eq!(seen.steps.len(), 6, "five batches an epoch, in windows of two, two and one");
    for (step, batches) in seen.steps.iter().zip([0..2, 2..4, 4..5, 0..2, 2..4, 4..5]) {
        let (sum, weight) = weigh(&run, batches.clone());
        assert_eq!(step.trained_tokens, weight as u64);
        assert!((step.loss - sum / weight as f64).abs() < 1e-6, "batches {batches:?}: {step:?}");
        let means: Vec<f64> = batches.map(|i| weigh(&run, i..i + 1)).map(|(sum, weight)| sum / weight as f64).collect();
        let mean = means.iter().sum::<f64>() / means.len() as f64;
        assert!(means.len() == 1 || (step.loss - mean).abs() > 1e-4, "tokens and batches weigh the same by accident");
    }
}

/// Every method that acts on no linear map, in each of its examples.
fn beyond_products() -> impl Iterator<Item = (String, AdapterConfig)> {
    MethodConfig::examples()
        .into_iter()
        .filter(|(_, method)| method.reach() != Reach::Maps)
        .map(|(name, method)| (name, AdapterConfig::new(method)))
}

#[test]
fn gradients_of_what_is_no_product_equal_finite_differences() {
    let mut tried = 0;
    for (name, config) in beyond_products() {
        for base in ["llama_gqa_tied", "gpt2", "gemma2", "qwen3"] {
            eprintln!("{name} on {base}");
            differences_agree(base, &config, &causal());
            tried += 1;
        }
        // Keys and values before the sequences are for decoders.
        if config.method.name() != "prefix_tuning" {
            differences_agree("bert", &config, &classes());
        }
    }
    assert!(tried >= 40, "{tried}");
}

#[test]
fn recomputation_gives_the_same_gradients_where_virtual_tokens_stand() {
    let mut tried = 0;
    for (name, config) in beyond_products().filter(|(_, config)| config.method.reach() == Reach::Sequence) {
        let s = setting("llama_gqa_tied", &config, DType::F64);
        let flow = Flow::train(5, 1, 0);
        let (kept, made_again) = (gradients(&s, &causal(), &flow, false), gradients(&s, &causal(), &flow, true));
        assert!((kept.0 - made_again.0).abs() < 1e-12, "{name}");
        for (a, b) in kept.1.iter().zip(&made_again.1) {
            let worst = flat(a).iter().zip(flat(b)).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-12, "{name}: {worst}");
        }
        tried += 1;
    }
    assert!(tried >= 7, "{tried}");
}

#[test]
fn a_run_that_would_have_to_prune_is_refused_before_its_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let adapter: toml::Table = "method = 'adalora'\nr = 3\ntinit = 11".parse().unwrap();
    let recipe = Recipe { adapter, ..recipe(&rows, &dir.path().join("out")) };
    let failed = common::session(&recipe, false, None).err().unwrap().to_string();
    assert!(failed.contains("tinit") && failed.contains("12 steps"), "{failed}");
}
