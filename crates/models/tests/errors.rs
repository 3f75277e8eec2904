//! Model folders and inputs with one thing wrong: one error each that names the file, key or tensor.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{golden, load, tensors};
use espalier_adapters::Flow;
use espalier_adapters::formats::safetensors::{Entry, write};
use espalier_models::config::SUPPORTED;
use espalier_models::input::PADDING;
use espalier_models::{LoadOptions, Model, ModelConfig, TokenBatch};
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";

fn copy(family: &str) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    for file in ["config.json", WEIGHTS] {
        std::fs::copy(golden().join("families").join(family).join(file), temp.path().join(file)).unwrap();
    }
    temp
}

fn error(folder: &Path) -> String {
    Model::load(folder, &LoadOptions::cpu()).map(|_| ()).expect_err("accepted").to_string()
}

fn after(family: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> String {
    let temp = copy(family);
    let mut all = tensors(&temp.path().join(WEIGHTS));
    change(&mut all);
    let entries = all.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
    write(&temp.path().join(WEIGHTS), entries, &BTreeMap::new()).unwrap();
    error(temp.path())
}

fn config(family: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden().join("families").join(family).join("config.json")).unwrap()).unwrap()
}

#[test]
fn truncated_weights_are_named() {
    let temp = copy("llama_gqa_tied");
    let path = temp.path().join(WEIGHTS);
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 5, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let message = error(temp.path());
        assert!(message.contains(WEIGHTS), "{cut}: {message}");
        assert!(message.contains(if cut < 8 { "too few" } else { "truncated" }), "{cut}: {message}");
    }
}

#[test]
fn tensors_that_do_not_match_the_architecture_are_named() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    const UP: &str = "model.layers.1.mlp.up_proj.weight";
    let message = after("llama_gqa_tied", |t| drop(t.remove(Q)));
    assert!(message.contains(Q) && message.contains("1 (") && message.contains("llama"), "{message}");
    let message = after("llama_gqa_tied", |t| drop(t.insert("model.layers.2.extra".into(), t[Q].clone())));
    assert!(message.contains("model.layers.2.extra") && message.contains("0 missing"), "{message}");
    let message = after("llama_gqa_tied", |t| drop(t.insert(UP.into(), t[UP].t().unwrap().contiguous().unwrap())));
    assert!(message.contains(UP) && message.contains("[64, 32]") && message.contains("[32, 64]"), "{message}");
    let message = after("gpt2", |t| drop(t.remove("transformer.wpe.weight")));
    assert!(message.contains("wpe"), "{message}");
    let message = after("llama1", |t| drop(t.remove("lm_head.weight")));
    assert!(message.contains("lm_head.weight"), "{message}");
    let message = after("llama_gqa_tied", |t| t.retain(|name, _| !name.contains("layers.1")));
    assert!(message.contains("...") && message.contains("layers.1"), "{message}");
    // A head of its own beside a tied table is left aside: some tools write both.
    let temp = copy("llama_gqa_tied");
    let mut all = tensors(&temp.path().join(WEIGHTS));
    all.insert("lm_head.weight".into(), all["model.embed_tokens.weight"].clone());
    let entries = all.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
    write(&temp.path().join(WEIGHTS), entries, &BTreeMap::new()).unwrap();
    load(temp.path());
}

#[test]
fn unknown_architectures_come_with_the_known_ones() {
    for (key, value) in [
        ("model_type", json!("mamba")),
        ("model_type", Value::Null),
        ("architectures", json!(["LlamaForTokenClassification"])),
    ] {
        let mut json = config("llama1");
        json[key] = value.clone();
        let message = ModelConfig::from_json(Path::new("config.json"), json).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains(key), "{message}");
        if key == "model_type" {
            assert!(SUPPORTED.iter().all(|name| message.contains(name)), "{message}");
            assert!(message.contains(value.as_str().unwrap_or("no model_type")), "{message}");
            assert!(message.contains("LlamaForCausalLM"), "{message}");
        }
    }
}

#[test]
fn bad_settings_are_named() {
    let cases = [
        ("llama1", "hidden_size", json!("wide")),
        ("llama1", "hidden_size", json!(0)),
        ("llama1", "hidden_size", Value::Null),
        ("llama1", "hidden_size", json!(-4)),
        ("llama1", "num_attention_heads", json!(0)),
        ("llama1", "num_attention_heads", json!(2.5)),
        ("llama1", "num_key_value_heads", json!(0)),
        ("llama1", "num_key_value_heads", json!(3)),
        ("llama1", "num_hidden_layers", json!(1u64 << 39)),
        ("llama1", "num_hidden_layers", json!("two")),
        ("llama1", "head_dim", json!(0)),
        ("llama1", "head_dim", json!(7)),
        ("llama1", "vocab_size", json!([48])),
        ("llama1", "intermediate_size", Value::Null),
        ("llama1", "hidden_act", json!("swoosh")),
        ("llama1", "rms_norm_eps", json!("small")),
        ("llama1", "attention_bias", json!("no")),
        ("llama1", "eos_token_id", json!(-1)),
        ("llama1", "rope_parameters", json!(3)),
        ("gpt2", "n_head", json!(5)),
        ("gpt2", "n_head", json!(0)),
        ("gpt2", "scale_attn_by_inverse_layer_idx", json!(true)),
        ("gpt2", "n_layer", json!(1u64 << 39)),
        ("bert", "num_attention_heads", json!(3)),
        ("bert", "position_embedding_type", json!("relative_key")),
        ("bert", "is_decoder", json!(true)),
        ("qwen2", "layer_types", json!(["full_attention"])),
        ("gemma2", "layer_types", json!(["full_attention", "circular"])),
        ("mistral", "sliding_window", json!("x")),
        ("mistral", "sliding_window", json!(0)),
    ];
    for (family, key, value) in cases {
        let mut json = config(family);
        json[key] = value.clone();
        let read = ModelConfig::from_json(Path::new("config.json"), json);
        let message = read.map(|_| ()).expect_err(&format!("{family} {key} = {value}")).to_string();
        assert!(message.contains("config.json") && message.contains(key), "{family} {key} = {value}: {message}");
    }
    for (family, value, wanted) in [
        ("llama1", json!({"rope_type": "spiral"}), "spiral"),
        ("llama1", json!({"rope_type": "linear"}), "factor"),
        ("llama1", json!({"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
        ("llama1", json!({"rope_type": "default", "rope_theta": -1.0}), "rope_theta"),
        ("llama1", json!({"rope_type": "default", "partial_rotary_factor": 3.0}), "partial_rotary_factor"),
        ("phi3", json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), "short_factor"),
    ] {
        let mut json = config(family);
        json["rope_parameters"] = value.clone();
        let read = ModelConfig::from_json(Path::new("config.json"), json);
        let message = read.map(|_| ()).expect_err(&value.to_string()).to_string();
        assert!(message.contains(wanted), "{value}: {message}");
    }
    for text in ["", "{", "[1, 2]", "nothing"] {
        let temp = copy("llama1");
        std::fs::write(temp.path().join("config.json"), text).unwrap();
        assert!(error(temp.path()).contains("config.json"), "{text}");
    }
}

#[test]
fn any_single_wrong_value_is_an_error_or_a_model() {
    // Every key of every family's file in turn with values of other kinds and sizes: read, refused, never worse.
    let values = [
        Value::Null,
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(1u64 << 39),
        json!(0.5),
        json!("x"),
        json!([]),
        json!({}),
        json!(true),
    ];
    for family in
        ["llama_yarn", "llama_dynamic", "phi3_longrope", "gemma2", "gpt2", "bert", "roberta", "qwen3", "mistral"]
    {
        let temp = copy(family);
        let whole = config(family);
        let input = TokenBatch::new(vec![1, 2, 3], 1, 3).unwrap();
        for key in whole.as_object().unwrap().keys() {
            for value in &values {
                let mut json = whole.clone();
                json[key] = value.clone();
                std::fs::write(temp.path().join("config.json"), json.to_string()).unwrap();
                if let Ok(model) = Model::load(temp.path(), &LoadOptions::cpu()) {
                    let _ = model.forward(&input, &Flow::eval());
                }
            }
        }
    }
}

#[test]
fn folders_without_a_model_say_what_they_hold() {
    let temp = tempfile::tempdir().unwrap();
    let missing = Model::load(&temp.path().join("nowhere"), &LoadOptions::cpu()).unwrap_err();
    assert!(missing.to_string().contains("nowhere") && missing.hint().is_some(), "{missing}");
    assert!(error(temp.path()).contains("config.json"));
    let temp = copy("llama1");
    std::fs::rename(temp.path().join(WEIGHTS), temp.path().join("pytorch_model.bin")).unwrap();
    let message = error(temp.path());
    assert!(message.contains(WEIGHTS) && message.contains("pytorch_model.bin"), "{message}");
}

#[test]
fn an_index_stays_within_its_folder() {
    let temp = copy("llama1");
    let index = temp.path().join("model.safetensors.index.json");
    let inner = temp.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::copy(temp.path().join(WEIGHTS), inner.join(WEIGHTS)).unwrap();
    let absolute = inner.join(WEIGHTS).to_string_lossy().into_owned();
    for outside in ["../x.safetensors", "inner/model.safetensors", absolute.as_str(), "..", "a\\b.safetensors"] {
        std::fs::write(&index, json!({"weight_map": {"a": outside}}).to_string()).unwrap();
        let message = error(temp.path());
        assert!(message.contains("index.json") && message.contains("not a file name of this folder"), "{message}");
    }
    for (text, wanted) in [
        (json!({"weight_map": {"a": 3}}).to_string(), "not a file name"),
        (json!({"weight_map": {}}).to_string(), "missing"),
        (json!({"weight_map": {"a": "gone.safetensors"}}).to_string(), "gone.safetensors"),
        (json!({"map": {}}).to_string(), "weight_map"),
        ("{".to_owned(), "index.json"),
    ] {
        std::fs::write(&index, &text).unwrap();
        let message = error(temp.path());
        assert!(message.contains(wanted), "{text}: {message}");
    }
    std::fs::copy(temp.path().join(WEIGHTS), temp.path().join("other.safetensors")).unwrap();
    std::fs::write(&index, json!({"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}).to_string())
        .unwrap();
    assert!(error(temp.path()).contains("in two files"), "{}", error(temp.path()));
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let model = load(&golden().join("families/gpt2"));
    let vocab = model.config().vocab as u32;
    let forward = |input: &TokenBatch| model.forward(input, &Flow::eval()).map(|_| ()).map_err(|e| e.to_string());
    let input = TokenBatch::new(vec![1, 2, 3, 1, vocab, 3], 2, 3).unwrap();
    let message = forward(&input).unwrap_err();
    assert!(message.contains(&format!("token id {vocab} (row 1, place 1)")), "{message}");
    assert!(message.contains(&format!("vocabulary of {vocab}")), "{message}");
    forward(&TokenBatch::new(vec![vocab - 1; 48], 1, 48).unwrap()).unwrap();
    let message = forward(&TokenBatch::new(vec![1; 49], 1, 49).unwrap()).unwrap_err();
    assert!(message.contains("49 tokens") && message.contains("48 positions"), "{message}");
    let mut cache = model.new_cache();
    model.advance(&TokenBatch::new(vec![1; 48], 1, 48).unwrap(), &mut cache, &Flow::eval()).unwrap();
    let next = TokenBatch::starting_at(vec![1], 1, 1, 48).unwrap();
    let message = model.advance(&next, &mut cache, &Flow::eval()).unwrap_err().to_string();
    assert!(message.contains("48 positions"), "{message}");
    let message = TokenBatch::new(vec![1; 5], 2, 3).unwrap_err().to_string();
    assert!(message.contains("5 values for 2 rows of 3"), "{message}");
    let mut input = TokenBatch::new(vec![1; 6], 2, 3).unwrap();
    input.segments = Some(vec![PADDING]);
    assert!(forward(&input).unwrap_err().contains("segments"));
    let roberta = load(&golden().join("families/roberta"));
    let most = roberta.config().max_positions;
    let message = roberta.forward(&TokenBatch::new(vec![5; most + 1], 1, most + 1).unwrap(), &Flow::eval());
    assert!(message.unwrap_err().to_string().contains(&format!("{most} positions")));
    let bert = load(&golden().join("families/bert"));
    let mut input = TokenBatch::new(vec![5; 3], 1, 3).unwrap();
    input.token_types = Some(vec![0, 1, 9]);
    assert!(bert.forward(&input, &Flow::eval()).is_err());
    let message = bert.advance(&input, &mut bert.new_cache(), &Flow::eval()).unwrap_err().to_string();
    assert!(message.contains("bert") && message.contains("cannot generate"), "{message}");
}

#[test]
fn empty_inputs_give_empty_scores_or_an_error() {
    for family in ["llama1", "gpt2", "bert", "gemma2"] {
        let model = load(&golden().join("families").join(family));
        for (batch, length) in [(0, 0), (0, 4), (2, 0)] {
            let input = TokenBatch::new(vec![], batch, length).unwrap();
            if let Ok(scores) = model.forward(&input, &Flow::eval()) {
                assert_eq!(scores.dims().first(), Some(&batch), "{family}");
                assert_eq!(scores.elem_count(), 0, "{family}");
            }
            let scores = model.advance(&input, &mut model.new_cache(), &Flow::eval());
            assert!(scores.is_err() || batch == 0, "{family}: scores after no token");
        }
    }
}

#[test]
fn labels_are_only_for_classifiers() {
    let options = LoadOptions { labels: Some(3), ..LoadOptions::cpu() };
    let message = Model::load(&golden().join("families/llama1"), &options).unwrap_err().to_string();
    assert!(message.contains("no classifier"), "{message}");
    let model = Model::load(&golden().join("families/bert"), &options).unwrap();
    let scores = model.forward(&TokenBatch::new(vec![1, 2], 1, 2).unwrap(), &Flow::eval()).unwrap();
    assert_eq!(scores.dims(), [1, 3]);
    assert_eq!((scores.dtype(), scores.device().location()), (DType::F32, Device::Cpu.location()));
}
