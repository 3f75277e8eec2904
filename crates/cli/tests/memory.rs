//! Merging and exporting take memory for a matrix, not for a model.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{json, ok, text};
use espalier_adapters::formats::safetensors::{Entry, write};
use serde_json::{Value, json as value};

const MIB: u64 = 1 << 20;
/// Largest tensor in f32: the token table, 4096 x 512.
const LARGEST: u64 = 8 * MIB;
const HIDDEN: usize = 512;
const WIDE: usize = 2048;
const VOCAB: usize = 4096;
/// What the program needs on its own above what it has when it begins: its code as it is used, threads, buffers of rows.
const FLOOR: u64 = 24 * MIB;
/// What two runs may differ by: what the allocator keeps for threads that came by.
const NOISE: u64 = 8 * MIB;

/// A tensor whose values repeat, so that it is made at once.
fn pattern(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| ((i * 7919) % 1009) as f32 / 25_000.0 - 0.02).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Writes a Llama of `layers` blocks of 14 MiB each in f32, and an adapter of every one of its linear maps.
fn model(folder: &Path, layers: usize, dtype: DType) {
    std::fs::create_dir_all(folder.join("adapter")).unwrap();
    let config = value!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": true,
        "hidden_act": "silu", "torch_dtype": "float32"
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let shapes = [
        ("self_attn.q_proj", [HIDDEN, HIDDEN]),
        ("self_attn.k_proj", [HIDDEN / 4, HIDDEN]),
        ("self_attn.v_proj", [HIDDEN / 4, HIDDEN]),
        ("self_attn.o_proj", [HIDDEN, HIDDEN]),
        ("mlp.gate_proj", [WIDE, HIDDEN]),
        ("mlp.up_proj", [WIDE, HIDDEN]),
        ("mlp.down_proj", [HIDDEN, WIDE]),
    ];
    let made: BTreeMap<[usize; 2], Tensor> =
        shapes.iter().map(|(_, shape)| (*shape, pattern(shape).to_dtype(dtype).unwrap())).collect();
    let ones = Tensor::ones(HIDDEN, dtype, &Device::Cpu).unwrap();
    let table = pattern(&[VOCAB, HIDDEN]).to_dtype(dtype).unwrap();
    let mut entries = vec![Entry::of("model.embed_tokens.weight", &table), Entry::of("model.norm.weight", &ones)];
    let mut factors = Vec::new();
    for i in 0..layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            entries.push(Entry::of(format!("model.layers.{i}.{norm}.weight"), &ones));
        }
        for (name, shape) in shapes {
            entries.push(Entry::of(format!("model.layers.{i}.{name}.weight"), &made[&shape]));
            let path = format!("base_model.model.model.layers.{i}.{name}");
            factors.push(Entry::of(format!("{path}.lora_A.weight"), &pattern(&[8, shape[1]])));
            factors.push(Entry::of(format!("{path}.lora_B.weight"), &pattern(&[shape[0], 8])));
            let magnitude = Tensor::full(0.4f32, shape[0], &Device::Cpu).unwrap();
            factors.push(Entry::of(format!("{path}.lora_magnitude_vector"), &magnitude));
        }
    }
    write(&folder.join("model.safetensors"), entries, &BTreeMap::new()).unwrap();
    write(&folder.join("adapter/adapter_model.safetensors"), factors, &BTreeMap::new()).unwrap();
    let config = value!({
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": true, "target_modules": "all-linear",
        "bias": "none", "task_type": "CAUSAL_LM"
    });
    std::fs::write(folder.join("adapter/adapter_config.json"), config.to_string()).unwrap();
}

fn merged(folder: &Path, out: &str, more: &[&str]) -> Value {
    let (model, adapter, out) = (text(folder), text(&folder.join("adapter")), text(&folder.join(out)));
    let mut args = vec!["merge-into-base", "--model", &model, "--adapter", &adapter, "--out", &out, "--device", "cpu"];
    args.extend(more);
    json(&args)
}

/// Bytes above the floor: writing, and comparing.
fn above(report: &Value) -> (u64, u64) {
    let of = |key: &str| report["memory"][key].as_u64().unwrap_or_else(|| panic!("no {key} in {report}"));
    let floor = of("floor");
    assert!(floor > 0 && floor < 64 * MIB, "{report}");
    (of("write").saturating_sub(floor), of("verification").saturating_sub(floor))
}

#[test]
fn a_merge_of_a_larger_model_takes_no_more_memory() {
    let temp = tempfile::tempdir().unwrap();
    let (small, large) = (temp.path().join("small"), temp.path().join("large"));
    model(&small, 1, DType::F32);
    model(&large, 8, DType::F32);
    let bytes = std::fs::metadata(large.join("model.safetensors")).unwrap().len();
    assert!(bytes > 110 * MIB, "{bytes}");
    let (write, compare) = above(&merged(&large, "merged", &[]));
    assert!(write <= 2 * LARGEST + FLOOR, "writing took {} MiB above the program", write / MIB);
    let (small_write, small_compare) = above(&merged(&small, "merged", &[]));
    assert!(write <= small_write + NOISE, "writing took {} and {} MiB", write / MIB, small_write / MIB);
    // A block or the table with its scores at a time.
    assert!(compare <= small_compare + NOISE, "comparing took {} and {} MiB", compare / MIB, small_compare / MIB);
    assert!(compare < bytes / 2, "comparing took {} of {} MiB", compare / MIB, bytes / MIB);
    let (write, _) = above(&merged(&large, "bf16", &["--save-dtype", "bf16", "--quantization", "nf4-double"]));
    assert!(write <= 2 * LARGEST + FLOOR, "writing NF4 as bf16 took {} MiB above the program", write / MIB);
    // What was merged with the model in memory part by part acts as the adapter does with the model in memory whole.
    let ids = temp.path().join("ids.safetensors");
    let row = Tensor::from_vec((0..24i64).map(|i| i * 131 % 4096).collect(), (1, 24), &Device::Cpu).unwrap();
    write_ids(&ids, &row);
    let scores = |model: &Path, adapter: Option<&Path>| {
        let (model, ids, out) = (text(model), text(&ids), text(&temp.path().join("scores.safetensors")));
        let adapter = adapter.map(text);
        let mut args = vec!["logits", "--model", &model, "--ids", &ids, "--out", &out, "--device", "cpu"];
        args.extend(adapter.iter().flat_map(|a| ["--adapter", a.as_str()]));
        ok(&args);
        let file = espalier_adapters::formats::safetensors::TensorFile::open(Path::new(&out)).unwrap();
        file.load("logits", &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let wanted = scores(&large, Some(&large.join("adapter")));
    let found = scores(&large.join("merged"), None);
    let worst = wanted.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-3 && wanted.iter().any(|v| v.abs() > 0.1), "{worst}");
}

fn write_ids(path: &Path, row: &Tensor) {
    write(path, vec![Entry::of("ids", row)], &BTreeMap::new()).unwrap();
}
