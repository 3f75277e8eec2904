//! Adapters written by PEFT: same scores, merging, switching, and files that say the same after a round trip.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use candle_core::{DType, Tensor};
use common::{device, difference, golden, load, logits, tensors};
use espalier_adapters::adapter::Property;
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::formats::folder;
use espalier_adapters::{AdapterSet, Host};
use espalier_models::Model;

const TOLERANCE: f64 = 1e-4;

/// Every golden adapter that is not refused.
fn cases() -> Vec<String> {
    let paths = std::fs::read_dir(golden().join("adapters")).unwrap().map(|e| e.unwrap().path());
    let mut names: Vec<String> = paths
        .filter(|path| path.is_dir() && !path.join("refused.txt").exists())
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(names.len() >= 37, "{names:?}");
    names
}

struct Case {
    model: Model,
    set: AdapterSet,
    ids: Tensor,
    expected: Tensor,
    base: Tensor,
}

fn open(name: &str) -> Case {
    let path = golden().join("adapters").join(name);
    let files = folder::read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
    let base = files.config.base.clone().unwrap();
    let mut model = load(&golden().join(base));
    let golden = tensors(&path.join("expected.safetensors"));
    let base = logits(&model, &golden["ids"]);
    let attached =
        folder::load(&mut model, files, false, DType::F32, &device()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut set = AdapterSet::new();
    set.add("a", attached).unwrap();
    set.activate(&mut model, &[("a", 1.0)]).unwrap();
    Case { model, set, ids: golden["ids"].clone(), expected: golden["logits"].clone(), base }
}

#[test]
fn scores_equal_peft() {
    let mut failures = Vec::new();
    for name in &cases() {
        let case = open(name);
        let d = difference(&logits(&case.model, &case.ids), &case.expected);
        eprintln!("{name:24} {d:.2e}");
        if d.is_nan() || d > TOLERANCE {
            failures.push(format!("{name}: {d:.3e}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn merging_changes_no_score_and_can_be_undone_exactly() {
    for name in &cases() {
        let mut case = open(name);
        if let Some(reason) = case.set.get("a").unwrap().config.method.exception(Property::Merge) {
            let refused = case.set.merge(&mut case.model, DType::F32).unwrap_err().to_string();
            assert!(refused.contains(reason), "{name}: {refused}");
            continue;
        }
        let merged = case.set.merge(&mut case.model, DType::F32).unwrap();
        let d = difference(&logits(&case.model, &case.ids), &case.expected);
        assert!(d < TOLERANCE, "{name}: merged differs by {d}");
        case.set.unmerge(&mut case.model, merged).unwrap();
        assert_eq!(difference(&logits(&case.model, &case.ids), &case.base), 0.0, "{name}: not the base again");
    }
}

#[test]
fn switching_off_gives_the_base() {
    for name in &cases() {
        let mut case = open(name);
        case.set.disable(&mut case.model).unwrap();
        assert_eq!(difference(&logits(&case.model, &case.ids), &case.base), 0.0, "{name}");
        case.set.activate(&mut case.model, &[("a", 1.0)]).unwrap();
        assert!(difference(&logits(&case.model, &case.ids), &case.expected) < TOLERANCE, "{name}");
    }
}

#[test]
fn a_round_trip_through_our_writer_changes_nothing() {
    for name in &cases() {
        let mut case = open(name);
        let temp = tempfile::tempdir().unwrap();
        folder::save(&mut case.model, case.set.get("a").unwrap(), temp.path()).unwrap();
        let files = folder::read(temp.path()).unwrap();
        assert_eq!(files.config.base_hash, Some(case.model.base_hash().unwrap()), "{name}");
        let original = folder::read(&golden().join("adapters").join(name)).unwrap();
        if !["pissa", "olora"].contains(&name.as_str()) {
            for (key, tensor) in &files.tensors {
                assert_eq!(difference(tensor, &original.tensors[key]), 0.0, "{name}: {key}");
            }
        }
        let mut model = load(&golden().join(original.config.base.clone().unwrap()));
        let again = folder::load(&mut model, files, false, DType::F32, &device()).unwrap();
        let mut set = AdapterSet::new();
        set.add("b", again).unwrap();
        set.activate(&mut model, &[("b", 1.0)]).unwrap();
        let d = difference(&logits(&model, &case.ids), &case.expected);
        assert!(d < TOLERANCE, "{name}: {d}");
    }
}

#[test]
fn two_adapters_act_as_the_sum_of_their_changes() {
    let mut case = open("lora_all");
    let second = folder::read(&golden().join("adapters/dora")).unwrap();
    let second = folder::load(&mut case.model, second, false, DType::F32, &device()).unwrap();
    case.set.add("b", second).unwrap();
    case.set.activate(&mut case.model, &[("a", 0.5), ("b", 1.0)]).unwrap();
    let together = logits(&case.model, &case.ids);
    let merged = case.set.merge(&mut case.model, DType::F32).unwrap();
    assert!(difference(&logits(&case.model, &case.ids), &together) < TOLERANCE);
    assert!(difference(&together, &case.expected) > 1e-2);
    case.set.unmerge(&mut case.model, merged).unwrap();
    assert_eq!(difference(&logits(&case.model, &case.ids), &case.base), 0.0);
}

#[test]
fn starts_from_the_base_are_those_of_peft() {
    for name in ["pissa", "olora"] {
        let path = golden().join("adapters").join(name);
        let config = folder::read_config(&path).unwrap();
        let golden_tensors = tensors(&path.join("expected.safetensors"));
        let mut model = load(&golden().join(config.base.clone().unwrap()));
        let base = logits(&model, &golden_tensors["ids"]);
        let attached = attach(&mut model, &config, Origin::Seed(0), DType::F32, &device()).unwrap();
        let module = "model.layers.0.mlp.down_proj";
        let of = |part: &str| attached.parameters.get(&format!("{module}.lora_{part}.weight")).unwrap().tensor.clone();
        let ours = of("B").matmul(&of("A")).unwrap();
        let theirs = |part: &str| golden_tensors[&format!("init.base_model.model.{module}.lora_{part}.weight")].clone();
        let d = difference(&ours, &theirs("B").matmul(&theirs("A")).unwrap());
        assert!(d < TOLERANCE, "{name}: B A differs by {d}");
        let mut set = AdapterSet::new();
        set.add("a", attached).unwrap();
        set.activate(&mut model, &[("a", 1.0)]).unwrap();
        let start = logits(&model, &golden_tensors["ids"]);
        assert!(difference(&start, &golden_tensors["logits_init"]) < TOLERANCE, "{name}");
        assert!(difference(&start, &base) < TOLERANCE, "{name}: the start is not the base");
    }
}

#[test]
fn refusals_name_what_is_wrong() {
    let temp = tempfile::tempdir().unwrap();
    let source = golden().join("adapters/lora_all");
    for file in [folder::CONFIG_FILE, folder::WEIGHTS_FILE] {
        std::fs::copy(source.join(file), temp.path().join(file)).unwrap();
    }
    let weights = temp.path().join(folder::WEIGHTS_FILE);
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let error = folder::read(temp.path()).unwrap_err().to_string();
    assert!(error.contains("truncated"), "{error}");
    std::fs::write(&weights, &bytes).unwrap();
    let mut files = folder::read(temp.path()).unwrap();
    let (name, tensor) = files.tensors.pop_first().unwrap();
    let mut model = load(&golden().join("families/llama_gqa_tied"));
    let again = folder::AdapterFiles {
        path: files.path.clone(),
        config: files.config.clone(),
        tensors: files.tensors.clone(),
        copies: files.copies.clone(),
        gguf: None,
    };
    let error = folder::load(&mut model, again, false, DType::F32, &device()).unwrap_err().to_string();
    assert!(error.contains(&name), "{error}");
    files.tensors.insert(name.replace("layers.0", "layers.7"), tensor);
    let error = folder::load(&mut model, files, false, DType::F32, &device()).unwrap_err().to_string();
    assert!(error.contains("layers.7"), "{error}");
    let mut other = load(&golden().join("families/mistral"));
    let mut files = folder::read(temp.path()).unwrap();
    files.config.base_hash = Some("sha256:0".into());
    let error = folder::load(&mut other, files, false, DType::F32, &device()).unwrap_err().to_string();
    assert!(error.contains("another base") || error.contains("hash"), "{error}");
}
