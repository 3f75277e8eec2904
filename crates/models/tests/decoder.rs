//! Decoding on the CPU: a decoder's step against the whole pass, and rows that go through different adapters against each alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{difference, golden, load};
use espalier_adapters::attach::{Attached, Origin, attach};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, MethodConfig, random};
use espalier_models::input::PADDING;
use espalier_models::{KvCache, LoadOptions, Model, ModelConfig, TokenBatch};
use serde_json::json;

const VOCAB: usize = 300;

fn random_model(dtype: DType) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 72, "intermediate_size": 200,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    let options = LoadOptions { dtype, ..LoadOptions::cpu() };
    Model::random(ModelConfig::from_json(std::path::Path::new("test"), config).unwrap(), &options).unwrap()
}

/// An adapter whose factors are both random.
fn adapter(model: &mut Model, method: &str, seed: u64) -> Attached {
    let config = AdapterConfig::new(MethodConfig::by_name(method).unwrap());
    let attached = attach(model, &config, Origin::Seed(seed), DType::F32, &Device::Cpu).unwrap();
    for parameter in attached.parameters.trainable().filter(|p| p.name.contains("lora_B")) {
        let stream = &mut random::stream(seed + 7, &parameter.name);
        let values = random::normal(stream, 0.1, parameter.tensor.shape(), &Device::Cpu).unwrap();
        parameter.var().unwrap().set(&values).unwrap();
    }
    attached
}

fn with(mut model: Model, method: &str) -> Model {
    let mut set = AdapterSet::new();
    let attached = adapter(&mut model, method, 1);
    set.add("a", attached).unwrap();
    set.activate(&mut model, &[("a", 1.0)]).unwrap();
    model
}

fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 7 + 3) % vocab) as u32).collect()
}

/// Rows of `ids` [rows, prompt], those with odd numbers three shorter and padded on the left, and a cache of them.
fn prompted(model: &Model, ids: &[u32], (rows, prompt): (usize, usize), flow: &Flow) -> KvCache {
    let pad = |row: usize| 3 * (row % 2);
    let cells = |cell: &dyn Fn(usize, Option<usize>) -> u32| -> Vec<u32> {
        (0..rows)
            .flat_map(|row| (0..prompt).map(move |at| (row, at.checked_sub(pad(row)))))
            .map(|(r, p)| cell(r, p))
            .collect()
    };
    let of = |row: usize, position: Option<usize>| position.map_or(0, |p| ids[row * prompt + p + pad(row)]);
    let mut input = TokenBatch::new(cells(&of), rows, prompt).unwrap();
    input.positions = cells(&|_, position| position.unwrap_or(0) as u32);
    if rows > 1 {
        input.segments = Some(cells(&|_, position| position.map_or(PADDING, |_| 0)));
    }
    let mut cache = model.new_cache();
    model.advance(&input, &mut cache, flow).unwrap();
    cache
}

/// A decoder's steps against the model's own.
fn agrees(what: &str, model: &Model, (rows, prompt): (usize, usize), flow: &Flow, tolerance: f64) {
    let vocab = model.config().vocab;
    let ids = tokens(rows * prompt, vocab);
    let mut cache = prompted(model, &ids, (rows, prompt), flow);
    let steps = 9;
    let mut decoder = model.decoder(&cache, cache.len() + steps, flow).unwrap().expect(what);
    assert_eq!((decoder.rows(), decoder.room()), (rows, steps));
    for step in 0..steps {
        let next: Vec<u32> = (0..rows).map(|row| (step * 17 + row * 5) as u32 % vocab as u32).collect();
        let mut input = TokenBatch::new(next.clone(), rows, 1).unwrap();
        input.positions =
            (0..rows).map(|row| (prompt + step - if rows > 1 { 3 * (row % 2) } else { 0 }) as u32).collect();
        let want = model.advance(&input, &mut cache, flow).unwrap();
        if step % 3 == 2 {
            // What a step chooses is the first of the best: the same, but for what rounding leaves equal.
            let chosen = decoder.step_greedy(Some(&next)).unwrap();
            let scores = want.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            for (scores, id) in scores.iter().zip(chosen) {
                let best = scores.iter().copied().fold(f32::MIN, f32::max);
                let close = (tolerance as f32) * scores.iter().fold(0f32, |top, s| top.max(s.abs()));
                assert!(scores[id as usize] >= best - 2.0 * close, "{what}, step {step}: {id}");
            }
            continue;
        }
        let got = decoder.step(&next).unwrap();
        let size = want.abs().unwrap().max_all().unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
        let off = difference(&got, &want) / size;
        assert!(off < tolerance, "{what}, step {step}: {off}");
    }
    assert!(decoder.step(&vec![0; rows]).unwrap_err().to_string().contains("full"));
}

#[test]
fn a_step_gives_what_the_whole_pass_gives() {
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 3e-2)] {
        for method in ["lora", "dora"] {
            let model = with(random_model(dtype), method);
            for size in [(1, 5), (2, 33), (5, 20), (13, 7), (32, 9)] {
                agrees(&format!("{method} {dtype:?} {size:?}"), &model, size, &Flow::eval(), tolerance);
            }
        }
    }
}

#[test]
fn families_with_windows_biases_and_partial_rotations_decode_too() {
    for name in ["llama1", "llama3_rope", "llama_bias", "llama_gqa_tied", "mistral", "phi3_partial", "qwen2"] {
        let model = load(&golden().join("families").join(name));
        agrees(name, &model, (3, 12), &Flow::eval(), 1e-5);
    }
}

#[test]
fn blocks_of_other_forms_have_no_decoder() {
    for name in ["gpt2", "gemma2", "qwen3"] {
        let model = load(&golden().join("families").join(name));
        let mut cache = model.new_cache();
        model.advance(&TokenBatch::new(vec![1, 2, 3], 1, 3).unwrap(), &mut cache, &Flow::eval()).unwrap();
        assert!(model.decoder(&cache, 8, &Flow::eval()).unwrap().is_none(), "{name}");
    }
}

#[test]
fn each_row_goes_through_its_own_adapter() {
    let mut model = random_model(DType::F32);
    let mut set = AdapterSet::new();
    for (name, method, seed) in [("a", "lora", 1), ("b", "dora", 2), ("c", "lora", 3)] {
        let attached = adapter(&mut model, method, seed);
        set.add(name, attached).unwrap();
    }
    let (rows, prompt) = (6, 11);
    let ids = tokens(rows * prompt, VOCAB);
    let input = TokenBatch::new(ids.clone(), rows, prompt).unwrap();
    let slots = [Some("a"), None, Some("b"), Some("c")];
    let chosen = [2, 0, 1, 3, 0, 2];
    // What each row gives alone.
    let mut alone = Vec::new();
    for (row, slot) in chosen.iter().enumerate() {
        match slots[*slot] {
            Some(name) => set.activate(&mut model, &[(name, 1.0)]).unwrap(),
            None => set.disable(&mut model).unwrap(),
        }
        let own = TokenBatch::new(ids[row * prompt..(row + 1) * prompt].to_vec(), 1, prompt).unwrap();
        alone.push(model.forward(&own, &Flow::eval()).unwrap());
    }
    let alone = Tensor::cat(&alone, 0).unwrap();
    set.activate_by_row(&mut model, &slots).unwrap();
    let flow = Flow::by_row(chosen.to_vec());
    let together = model.forward(&input, &flow).unwrap();
    assert!(difference(&together, &alone) < 1e-5, "{}", difference(&together, &alone));
    agrees("rows of four kinds", &model, (rows, prompt), &flow, 1e-5);
    agrees("rows of one kind", &model, (2, 8), &Flow::by_row(vec![3, 3]), 1e-5);

    let mut cache = prompted(&model, &ids, (rows, prompt), &flow);
    let mut decoder = model.decoder(&cache, 20, &flow).unwrap().unwrap();
    assert!(decoder.keep_rows(&[4, 2]).unwrap());
    cache.keep_rows(&[4, 2]).unwrap();
    let mut input = TokenBatch::new(vec![8, 9], 2, 1).unwrap();
    input.positions = vec![prompt as u32; 2];
    let want = model.advance(&input, &mut cache, &Flow::by_row(vec![chosen[4], chosen[2]])).unwrap();
    assert!(difference(&decoder.step(&[8, 9]).unwrap(), &want) < 1e-5);
    assert_eq!(decoder.rows(), 2);
    assert!(decoder.keep_rows(&[2]).is_err());

    let message =
        |flow: &Flow| model.forward(&TokenBatch::new(vec![1, 2], 2, 1).unwrap(), flow).unwrap_err().to_string();
    assert!(message(&Flow::eval()).contains("no sequence says which"), "{}", message(&Flow::eval()));
    assert!(message(&Flow::by_row(vec![0, 9])).contains("adapter 9 of 4"));
    assert!(message(&Flow::by_row(vec![0, 1, 2])).contains("3 sequences"));
}

#[test]
fn scores_that_are_no_numbers_choose_nothing() {
    let mut model = random_model(DType::F32);
    let attached = adapter(&mut model, "lora", 1);
    let parameter = attached.parameters.trainable().find(|p| p.name.contains("lora_B")).unwrap();
    let infinite = Tensor::full(f32::INFINITY, parameter.tensor.shape(), &Device::Cpu).unwrap();
    parameter.var().unwrap().set(&infinite).unwrap();
    let mut set = AdapterSet::new();
    set.add("a", attached).unwrap();
    set.activate_by_row(&mut model, &[Some("a"), None]).unwrap();
    let flow = Flow::by_row(vec![0, 1]);
    let cache = prompted(&model, &tokens(14, VOCAB), (2, 7), &flow);
    let mut decoder = model.decoder(&cache, 10, &flow).unwrap().unwrap();
    let chosen = decoder.step_greedy(Some(&[1, 2])).unwrap();
    assert_eq!(chosen[0], u32::MAX);
    assert!((chosen[1] as usize) < VOCAB, "a row beside one without numbers is as it was");
}

#[test]
fn an_adapter_that_changes_more_than_linear_maps_is_not_put_beside_others() {
    let mut model = random_model(DType::F32);
    let config = AdapterConfig {
        modules_to_save: vec!["model.norm".into()],
        ..AdapterConfig::new(MethodConfig::by_name("lora").unwrap())
    };
    let attached = attach(&mut model, &config, Origin::Seed(0), DType::F32, &Device::Cpu).unwrap();
    let mut set = AdapterSet::new();
    set.add("whole", attached).unwrap();
    let message = set.activate_by_row(&mut model, &[Some("whole")]).unwrap_err().to_string();
    assert!(message.contains("model.norm"), "{message}");
}
