//! `adapter check` on good and bad adapters, and files of loralib.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{check, fails, golden, ok, text};
use espalier_adapters::formats::safetensors::{Entry, TensorFile, write};
use serde_json::{Value, json};

/// A folder of real files below `ESPALIER_DATA`.
fn data(name: &str) -> Option<PathBuf> {
    let found = std::env::var_os("ESPALIER_DATA").map(|root| PathBuf::from(root).join(name)).filter(|p| p.is_dir());
    if found.is_none() {
        eprintln!("skipped: ESPALIER_DATA names no folder with {name}");
    }
    found
}

#[test]
fn golden_adapters_pass_with_and_without_their_base() {
    for entry in std::fs::read_dir(golden().join("adapters")).unwrap() {
        let path = entry.unwrap().path();
        if path.join("refused.txt").exists() {
            continue;
        }
        let config: Value = serde_json::from_slice(&std::fs::read(path.join("adapter_config.json")).unwrap()).unwrap();
        let base = text(&golden().join(config["base_model_name_or_path"].as_str().unwrap()));
        let report = check(0, &[&text(&path), "--model", &base]);
        assert_eq!(report["ok"], true, "{report}");
        assert!(report["tool"].as_str().unwrap().starts_with("PEFT 0."), "{report}");
        // Norms, token rows and what stands before the sequences are no sites.
        assert!(report["on_base"]["parameters"].as_u64().unwrap() > 0, "{report}");
        assert!(report["bytes"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(report["zero_products"], 0, "{report}");
    }
    // A setting that is not understood.
    let report = check(1, &[&text(&golden().join("adapters/lora_bias_term"))]);
    assert!(report["faults"][0].as_str().unwrap().contains("lora_bias"), "{report}");
}

/// A golden adapter with changes, in a folder of its own.
fn changed(
    folder: &Path,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut BTreeMap<String, Tensor>),
) -> String {
    let source = golden().join("adapters/rslora_patterns");
    let mut json: Value = serde_json::from_slice(&std::fs::read(source.join("adapter_config.json")).unwrap()).unwrap();
    let weights = TensorFile::open(&source.join("adapter_model.safetensors")).unwrap();
    let mut all = weights.load_all(&Device::Cpu).unwrap();
    config(&mut json);
    tensors(&mut all);
    std::fs::write(folder.join("adapter_config.json"), json.to_string()).unwrap();
    let entries = all.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
    write(&folder.join("adapter_model.safetensors"), entries, &BTreeMap::new()).unwrap();
    text(folder)
}

#[test]
fn every_fault_is_found_and_named() {
    const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let temp = tempfile::tempdir().unwrap();
    let report = |config: &dyn Fn(&mut Value), tensors: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let path = changed(temp.path(), config, tensors);
        check(1, &[&path])["faults"].to_string()
    };
    let nothing = |_: &mut Value| {};
    let none = |_: &mut BTreeMap<String, Tensor>| {};
    let nan = |t: &mut BTreeMap<String, Tensor>| {
        let bad = (t[Q].clone() / 0.0).unwrap();
        t.insert(Q.into(), bad);
        let bad = t[B].to_dtype(DType::U32).unwrap();
        t.insert(B.into(), bad);
    };
    let found = report(&nothing, &nan);
    assert!(found.contains("NaN") && found.contains("U32"), "both: {found}");
    let found = report(&nothing, &|t| drop(t.remove(B)));
    assert!(found.contains("q_proj") && found.contains("lora_B.weight"), "{found}");
    let found =
        report(&nothing, &|t| drop(t.insert(B.into(), Tensor::ones((32, 5), DType::F32, &Device::Cpu).unwrap())));
    assert!(found.contains("rank 2") && found.contains("rank 5"), "{found}");
    let found = report(&|c| c["r"] = json!(5), &none);
    assert!(found.contains("the settings say rank 5, the tensors have 4"), "{found}");
    let found = report(&|c| c["rank_pattern"]["nowhere"] = json!(5), &none);
    assert!(found.contains("nowhere"), "{found}");
    let found = report(&|c| c["target_modules"].as_array_mut().unwrap().retain(|t| t != "q_proj"), &none);
    assert!(found.contains("q_proj"), "{found}");
    let found = report(&|c| c["use_velocity"] = json!(true), &none);
    assert!(found.contains("use_velocity"), "{found}");
    let found = report(&nothing, &|t| drop(t.insert("lora_A.weight".into(), t[Q].clone())));
    assert!(found.contains("not named as PEFT"), "{found}");
    // A product of zero is no fault, but is said.
    let zero = |t: &mut BTreeMap<String, Tensor>| drop(t.insert(B.into(), t[B].zeros_like().unwrap()));
    let path = changed(temp.path(), nothing, zero);
    let report = check(0, &[&path]);
    assert_eq!(report["zero_products"], 1, "{report}");
    assert!(report["notes"].to_string().contains("product of zero"), "{report}");
    // Sound by itself, but another model's.
    let report = check(1, &[&path, "--model", &text(&golden().join("families/gpt2"))]);
    assert!(report["faults"][0].as_str().unwrap().contains("matches no module"), "{report}");
    // The exit code speaks in text too.
    assert!(
        fails(1, &["adapter", "check", &path, "--model", &text(&golden().join("families/gpt2"))]).contains("1 fault")
    );
    assert!(ok(&["adapter", "check", &path]).contains("no fault found"));
    // No adapter at all, and pickled weights.
    let empty = temp.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(check(1, &[&text(&empty)])["faults"].to_string().contains("neither"));
    std::fs::write(empty.join("adapter_model.bin"), "x").unwrap();
    assert!(check(1, &[&text(&empty)])["faults"].to_string().contains("pickle"));
}

#[test]
fn a_loralib_file_needs_its_alpha_and_gives_the_scores_of_its_factors() {
    // RoBERTa's golden adapter in loralib's naming.
    let temp = tempfile::tempdir().unwrap();
    let source = golden().join("adapters/roberta_lora");
    let all = TensorFile::open(&source.join("adapter_model.safetensors")).unwrap().load_all(&Device::Cpu).unwrap();
    let bare = |name: &str| {
        let name = name.trim_start_matches("base_model.model.");
        name.replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B")
    };
    let entries = all.iter().map(|(name, t)| Entry::of(bare(name), t)).collect();
    let file = temp.path().join("roberta_lora.safetensors");
    write(&file, entries, &BTreeMap::new()).unwrap();
    let (base, file) = (text(&golden().join("families/roberta")), text(&file));
    assert!(check(1, &[&file])["faults"].to_string().contains("numerator"));
    let report = check(0, &[&file, "--alpha", "4", "--model", &base]);
    assert_eq!((&report["form"], &report["sites"]), (&json!("loralib file"), &json!(4)), "{report}");
    let (ids, out) = (text(&source.join("expected.safetensors")), temp.path().join("x.safetensors"));
    let target = text(&out);
    let args = ["logits", "--model", &base, "--adapter", &file, "--ids", &ids, "--out", &target];
    assert!(fails(1, &args).contains("alpha"));
    ok(&[&args[..], &["--adapter-alpha", "4"]].concat());
    let ours = TensorFile::open(&out).unwrap().load("logits", &Device::Cpu).unwrap();
    let wanted = TensorFile::open(Path::new(&ids)).unwrap().load("logits", &Device::Cpu).unwrap();
    let d = (ours - wanted).unwrap().abs().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(d.iter().all(|d| *d < 1e-4), "{d:?}");
    // A layout that holds its own does not take another.
    let peft = text(&source);
    assert!(check(1, &[&peft, "--alpha", "4", "--model", &base])["faults"].to_string().contains("holds its own"));
}

#[test]
fn real_adapters_are_recognised() {
    if let Some(folder) = data("ckpt-lora-roberta-base-mnli") {
        let file = text(&folder.join("roberta_base_lora_mnli.safetensors"));
        let report = check(0, &[&file, "--alpha", "16"]);
        assert_eq!((&report["sites"], &report["ranks"]), (&json!(24), &json!({"8": 24})), "{report}");
        assert_eq!(report["tensors"], 52, "{report}");
    }
    if let Some(folder) = data("ckpt-lora-peft-gpt2-tigrinya") {
        let report = check(0, &[&text(&folder)]);
        assert_eq!((&report["sites"], &report["ranks"]), (&json!(36), &json!({"8": 36})), "{report}");
    }
    if let Some(folder) = data("ckpt-lora-sd15-lora-disney") {
        let report = check(1, &[&text(&folder.join("lora_disney.safetensors"))]);
        assert!(report["form"].as_str().unwrap().contains("cloneofsimo"), "{report}");
        assert!(report["faults"].to_string().contains("image model"), "{report}");
    }
}
