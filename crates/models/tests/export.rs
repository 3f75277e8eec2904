//! Exported folders: read back with equal scores and hash, in one file or shards, and untied where merging unties.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{difference, golden, load, logits, tensors};
use espalier_adapters::formats::{atomic, folder};
use espalier_adapters::{AdapterSet, Host};
use espalier_models::export::ExportOptions;
use espalier_models::{LoadOptions, Model, Quantization};
use serde_json::{Value, json};

const FAMILIES: &[&str] = &[
    "llama1",
    "llama_gqa_tied",
    "llama3_rope",
    "llama_bias",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3_longrope",
    "gemma2",
    "gpt2",
    "bert",
    "roberta",
];

fn ids(family: &str) -> Tensor {
    tensors(&golden().join("families").join(family).join("expected.safetensors"))["ids"].clone()
}

fn files(folder: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_model_comes_back_as_it_was() {
    for family in FAMILIES {
        let mut model = load(&golden().join("families").join(family));
        let ids = ids(family);
        let (before, hash) = (logits(&model, &ids), model.base_hash().unwrap());
        for shard_bytes in [u64::MAX, 20_000, 1] {
            let temp = tempfile::tempdir().unwrap();
            let path = temp.path().join("model");
            let options = ExportOptions { shard_bytes, ..ExportOptions::default() };
            let written = model.export(&path, &options).unwrap();
            let names = files(&path);
            let weights = names.iter().filter(|n| n.ends_with(".safetensors")).count();
            assert_eq!(weights, written.files, "{family}: {names:?}");
            match shard_bytes {
                u64::MAX => assert_eq!(names, ["config.json", "model.safetensors"], "{family}"),
                1 => assert_eq!(written.files, written.tensors, "{family}"),
                _ => assert!(written.files >= 2, "{family}: {names:?}"),
            }
            let again = load(&path);
            assert_eq!(difference(&logits(&again, &ids), &before), 0.0, "{family}");
            assert_eq!(again.base_hash().unwrap(), hash, "{family}");
            assert_eq!(again.config().names, model.config().names, "{family}");
            // A second export over the first is the same folder.
            let first: Vec<_> = names.iter().map(|n| std::fs::read(path.join(n)).unwrap()).collect();
            model.export(&path, &options).unwrap();
            let second: Vec<_> = files(&path).iter().map(|n| std::fs::read(path.join(n)).unwrap()).collect();
            assert!(first == second, "{family}: the second export differs");
        }
    }
}

#[test]
fn an_index_names_every_tensor_and_its_shard() {
    let temp = tempfile::tempdir().unwrap();
    let mut model = load(&golden().join("families/llama1"));
    let options = ExportOptions { shard_bytes: 30_000, ..ExportOptions::default() };
    let written = model.export(temp.path(), &options).unwrap();
    let index: Value =
        serde_json::from_slice(&std::fs::read(temp.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), written.tensors);
    let mut total = 0;
    for (name, file) in map {
        let shard = tensors(&temp.path().join(file.as_str().unwrap()));
        total += shard[name].elem_count() * 4;
    }
    assert_eq!(index["metadata"]["total_size"], json!(total));
}

#[test]
fn the_dtype_asked_for_is_written_and_said() {
    let mut model = load(&golden().join("families/llama1"));
    for (dtype, name) in [(DType::BF16, "bfloat16"), (DType::F16, "float16"), (DType::F32, "float32")] {
        let temp = tempfile::tempdir().unwrap();
        let options = ExportOptions { dtype: Some(dtype), ..ExportOptions::default() };
        model.export(temp.path(), &options).unwrap();
        let stored = tensors(&temp.path().join("model.safetensors"));
        assert!(stored.values().all(|t| t.dtype() == dtype));
        let config: Value = serde_json::from_slice(&std::fs::read(temp.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["dtype"], name);
        let ids = ids("llama1");
        let scale = if dtype == DType::F32 { 0.0 } else { 0.3 };
        assert!(difference(&logits(&load(temp.path()), &ids), &logits(&model, &ids)) <= scale);
    }
}

#[test]
fn quantised_models_are_written_dense() {
    let options = LoadOptions { quantization: Some(Quantization::Nf4 { double: true }), ..LoadOptions::cpu() };
    let gguf = golden().join("gguf");
    let nf4 = (Model::load(&golden().join("families/llama1"), &options).unwrap(), ids("llama1"));
    let gguf = (
        Model::load(&gguf.join("tiny.gguf"), &LoadOptions::cpu()).unwrap(),
        tensors(&gguf.join("expected.safetensors"))["ids"].clone(),
    );
    for (mut model, ids) in [nf4, gguf] {
        let temp = tempfile::tempdir().unwrap();
        model.export(temp.path(), &ExportOptions::default()).unwrap();
        assert!(difference(&logits(&load(temp.path()), &ids), &logits(&model, &ids)) < 1e-4);
    }
}

/// Merges a golden adapter and exports the outcome; the folder, whether it was untied, the ids and the adapted scores.
fn merged(case: &str, shard_bytes: u64) -> (tempfile::TempDir, bool, Tensor, Tensor) {
    let path = golden().join("adapters").join(case);
    let files = folder::read(&path).unwrap();
    let mut model = load(&golden().join(files.config.base.clone().unwrap()));
    let attached = folder::load(&mut model, files, false, DType::F32, &Device::Cpu).unwrap();
    let mut set = AdapterSet::new();
    set.add("a", attached).unwrap();
    set.activate(&mut model, &[("a", 1.0)]).unwrap();
    let merged = set.merge(&mut model, DType::F32).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let options = ExportOptions { untie: merged.unties, shard_bytes, ..ExportOptions::default() };
    model.export(temp.path(), &options).unwrap();
    let mut expected = tensors(&path.join("expected.safetensors"));
    (temp, merged.unties, expected.remove("ids").unwrap(), expected.remove("logits").unwrap())
}

#[test]
fn merged_models_score_as_the_adapted_ones() {
    for case in [
        "lora_all",
        "dora",
        "lora_bias_all",
        "modules_to_save",
        "trainable_tokens",
        "lora_embedding",
        "lora_embedding_untied",
        "lora_embedding_tied",
        "modules_to_save_pair",
        "modules_to_save_tied",
        "gpt2_lora",
        "gpt2_dora",
        "phi3_dora",
        "gemma2_lora",
        "bert_lora",
        "roberta_lora",
    ] {
        for shard_bytes in [u64::MAX, 15_000] {
            let (temp, unties, ids, expected) = merged(case, shard_bytes);
            // A table that changed alone: the head must not follow it.
            assert_eq!(unties, matches!(case, "lora_embedding" | "modules_to_save_pair"), "{case}");
            let model = load(temp.path());
            let d = difference(&logits(&model, &ids), &expected);
            assert!(d < 1e-4, "{case}: {d}");
            assert!(!unties || !model.config().tied, "{case}");
        }
    }
}

#[test]
fn only_what_was_written_here_is_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let mut model = load(&golden().join("families/llama_gqa_tied"));
    let options = ExportOptions::default();
    let refused = |model: &mut Model, path: &std::path::Path, word: &str| {
        let before = files(path);
        let error = model.export(path, &options).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(files(path), before, "{word}");
    };
    // A folder with something of the user's, even beside an export.
    let mine = temp.path().join("mine");
    model.export(&mine, &options).unwrap();
    model.export(&mine, &options).unwrap();
    std::fs::write(mine.join("notes.txt"), "years of work").unwrap();
    refused(&mut model, &mine, "notes.txt");
    assert_eq!(std::fs::read_to_string(mine.join("notes.txt")).unwrap(), "years of work");
    // A model of other tools.
    let other = temp.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden().join("families/llama1").join(name), other.join(name)).unwrap();
    }
    refused(&mut model, &other, "model.safetensors");
    // The base, under whatever name, even one that was written here.
    std::fs::remove_file(mine.join("notes.txt")).unwrap();
    let mut again = load(&mine);
    refused(&mut again, &mine, "base");
    refused(&mut again, &mine.join("../mine"), "base");
    // An empty folder is as good as none.
    let empty = temp.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    model.export(&empty, &options).unwrap();
}

#[test]
fn a_full_disk_leaves_the_earlier_export_whole() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("model");
    let mut model = load(&golden().join("families/llama_gqa_tied"));
    model.export(&path, &ExportOptions::default()).unwrap();
    let names = files(&path);
    let before: Vec<_> = names.iter().map(|n| std::fs::read(path.join(n)).unwrap()).collect();
    let options = ExportOptions { shard_bytes: 20_000, ..ExportOptions::default() };
    let whole = temp.path().join("whole");
    let total = model.export(&whole, &options).unwrap().bytes;
    for limit in (0..total).step_by(total as usize / 40).chain([total - 1, total]) {
        let error = atomic::with_write_limit(limit, || model.export(&path, &options)).unwrap_err();
        assert!(error.to_string().contains("model"), "{error}");
        let now: Vec<_> = files(&path).iter().map(|n| std::fs::read(path.join(n)).unwrap()).collect();
        assert!(files(&path) == names && now == before, "limit {limit}");
        assert_eq!(files(temp.path()), ["model", "whole"], "limit {limit}");
    }
}
