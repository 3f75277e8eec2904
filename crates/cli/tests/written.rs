//! What is written is read back and held to what it was made from; what is there already is not lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use common::{fails, golden, json, ok, run, text};
use espalier_adapters::formats::safetensors::{Entry, MappedFile, write};

fn base(name: &str) -> String {
    text(&golden().join("families").join(name))
}

fn adapter(name: &str) -> String {
    text(&golden().join("adapters").join(name))
}

fn merge(base: &str, adapter: &str, out: &Path, more: &[&str]) -> Vec<String> {
    let out = text(out);
    let mut args = vec!["merge-into-base", "--model", base, "--adapter", adapter, "--out", &out];
    args.extend(more);
    args.into_iter().map(str::to_owned).collect()
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Scores of a model on the ids of an adapter's golden file.
fn scores(model: &str, adapter: Option<&str>, ids: &Path, out: &Path) -> Tensor {
    let (ids, target) = (text(ids), text(out));
    let mut args = vec!["logits", "--model", model, "--ids", &ids, "--out", &target];
    if let Some(adapter) = adapter {
        args.extend(["--adapter", adapter]);
    }
    ok(&args);
    MappedFile::open(out).unwrap().load("logits", &Device::Cpu).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let pairs = values(a).into_iter().zip(values(b));
    pairs.fold(0.0, |m, (x, y)| if (x - y).abs() <= m as f32 { m } else { f64::from((x - y).abs()) })
}

#[test]
fn a_merge_is_measured_on_the_files_in_the_dtype_they_have() {
    let temp = tempfile::tempdir().unwrap();
    let (base, adapter) = (base("llama_gqa_tied"), adapter("lora_all"));
    let exact = json(&strs(&merge(&base, &adapter, &temp.path().join("f32"), &[])));
    assert!(exact["max_difference"].as_f64().unwrap() < 1e-4, "{exact}");
    let out = temp.path().join("bf16");
    let rounded = json(&strs(&merge(&base, &adapter, &out, &["--save-dtype", "bf16"])));
    let said = rounded["max_difference"].as_f64().unwrap();
    assert!(said > 1e-3, "rounding to bf16 was not seen: {rounded}");
    assert!(rounded["loss_difference"].as_f64().unwrap() != 0.0 && rounded["top1_agreement"].as_f64().unwrap() > 0.5);
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("Largest difference of scores") && card.contains(&format!("{said:.3e}")), "{card}");
    assert!(
        card.contains("Mean loss") && card.contains("base_model_relation") == card.contains("base_model:"),
        "{card}"
    );
    // Above the limit nothing is left.
    let out = temp.path().join("strict");
    let args = merge(&base, &adapter, &out, &["--save-dtype", "bf16", "--tolerance", "1e-6"]);
    let error = fails(1, &strs(&args));
    assert!(error.contains("not written") && error.contains("1.0e-6"), "{error}");
    assert!(!out.exists());
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 2, "a temporary folder was left");
}

#[test]
fn a_head_that_stays_while_the_table_changes_is_compared() {
    let temp = tempfile::tempdir().unwrap();
    let base = base("llama_gqa_tied");
    for (name, unties) in [
        ("lora_embedding", true),
        ("lora_embedding_tied", false),
        ("modules_to_save_pair", true),
        ("modules_to_save_tied", false),
    ] {
        let (adapter, out) = (adapter(name), temp.path().join(name));
        let report = json(&strs(&merge(&base, &adapter, &out, &[])));
        assert_eq!(report["unties"], unties, "{name}");
        assert!(report["max_difference"].as_f64().unwrap() < 1e-4, "{name}: {report}");
        let ids = golden().join("adapters").join(name).join("expected.safetensors");
        let wanted = MappedFile::open(&ids).unwrap().load("logits", &Device::Cpu).unwrap();
        let d = difference(&scores(&text(&out), None, &ids, &temp.path().join("x.safetensors")), &wanted);
        assert!(d < 1e-4, "{name}: {d}");
    }
}

#[test]
fn nothing_of_the_users_is_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let (model, adapter) = (temp.path().join("base"), adapter("lora_all"));
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden().join("families/llama_gqa_tied").join(name), model.join(name)).unwrap();
    }
    let (base, before) = (text(&model), std::fs::read(model.join("model.safetensors")).unwrap());
    let error = fails(1, &strs(&merge(&base, &adapter, &model, &[])));
    assert!(error.contains("base model itself"), "{error}");
    let error = fails(1, &["export", "--model", &base, "--adapter", &adapter, "--out", &base]);
    assert!(error.contains("base model itself"), "{error}");
    assert_eq!(std::fs::read(model.join("model.safetensors")).unwrap(), before);
    let mine = temp.path().join("mine");
    std::fs::create_dir(&mine).unwrap();
    std::fs::write(mine.join("notes.txt"), "mine").unwrap();
    let error = fails(1, &strs(&merge(&base, &adapter, &mine, &[])));
    assert!(error.contains("notes.txt") && mine.join("notes.txt").is_file(), "{error}");
    let error = fails(1, &["export", "--model", &base, "--form", "model", "--out", &text(&mine)]);
    assert!(error.contains("notes.txt"), "{error}");
    // An adapter of another tool is not written over; ours is.
    let theirs = temp.path().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(golden().join("adapters/dora").join(name), theirs.join(name)).unwrap();
    }
    let error = fails(1, &["export", "--model", &base, "--adapter", &adapter, "--out", &text(&theirs)]);
    assert!(error.contains("not written here"), "{error}");
    let ours = text(&temp.path().join("ours"));
    ok(&["export", "--model", &base, "--adapter", &adapter, "--out", &ours]);
    ok(&["export", "--model", &base, "--adapter", &adapter, "--out", &ours]);
    // A result is written again over itself.
    let out = temp.path().join("out");
    ok(&strs(&merge(&base, &adapter, &out, &[])));
    ok(&strs(&merge(&base, &adapter, &out, &[])));
}

/// A golden adapter that trains the rows of a few tokens alone: its other tensors are zero.
fn rows_alone(folder: &Path) -> PathBuf {
    let source = golden().join("adapters/trainable_tokens_untied");
    std::fs::copy(source.join("adapter_config.json"), folder.join("adapter_config.json")).unwrap();
    let file = MappedFile::open(&source.join("adapter_model.safetensors")).unwrap();
    let entries = file.load_all(&Device::Cpu).unwrap().into_iter().map(|(name, t)| {
        let t = if name.contains("lora_B") { t.zeros_like().unwrap() } else { t };
        Entry::of(name, &t)
    });
    write(&folder.join("adapter_model.safetensors"), entries.collect(), &Default::default()).unwrap();
    folder.to_owned()
}

#[test]
fn trained_rows_are_in_the_probe() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("rows");
    std::fs::create_dir(&folder).unwrap();
    let adapter = text(&rows_alone(&folder));
    let report = json(&strs(&merge(&base("llama1"), &adapter, &temp.path().join("out"), &[])));
    assert!(report["adapter_effect"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["probe"].as_str().unwrap().contains("trained tokens"), "{report}");
}

#[test]
fn a_probe_of_data_is_used_and_counted() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    let line = |i: u32| format!("{{\"input_ids\": [{i}, 5, 9, 11, 3], \"labels\": [-100, -100, 9, 11, 3]}}\n");
    std::fs::write(&rows, (1..7).map(line).collect::<String>()).unwrap();
    let args = ["--probe", &text(&rows), "--probe-rows", "4"];
    let report = json(&strs(&merge(&base("llama_gqa_tied"), &adapter("dora"), &temp.path().join("out"), &args)));
    assert_eq!((&report["positions"], &report["tokens"]), (&20.into(), &12.into()), "{report}");
    assert!(report["probe"].as_str().unwrap().starts_with("4 of 4 rows of"), "{report}");
}

#[test]
fn exports_are_verified_and_say_so_on_their_card() {
    let temp = tempfile::tempdir().unwrap();
    let (base, ids) = (base("llama_gqa_tied"), golden().join("adapters/pissa/expected.safetensors"));
    let wanted = MappedFile::open(&ids).unwrap().load("logits", &Device::Cpu).unwrap();
    let out = temp.path().join("peft");
    let report = json(&["export", "--model", &base, "--adapter", &adapter("pissa"), "--verify", "--out", &text(&out)]);
    assert!(report["max_difference"].as_f64().unwrap() < 1e-4, "{report}");
    assert!(std::fs::read_to_string(out.join("README.md")).unwrap().contains("Same best score"));
    let again = scores(&base, Some(&text(&out)), &ids, &temp.path().join("x.safetensors"));
    assert!(difference(&again, &wanted) < 1e-4);
    let gguf = text(&golden().join("gguf/tiny.gguf"));
    let out = temp.path().join("model");
    let args =
        ["export", "--model", &gguf, "--form", "model", "--save-dtype", "bf16", "--verify", "--out", &text(&out)];
    let report = json(&args);
    assert!(report["max_difference"].as_f64().unwrap() > 0.0 && report["top1_agreement"].as_f64().unwrap() > 0.5);
    assert!(out.join("README.md").is_file());
    let strict = temp.path().join("strict");
    let mut args = args.to_vec();
    let strict_text = text(&strict);
    *args.last_mut().unwrap() = &strict_text;
    args.extend(["--tolerance", "1e-9"]);
    assert!(fails(1, &args).contains("not written"));
    assert!(!strict.exists());
    let plain = ["export", "--model", &base, "--form", "model", "--tolerance", "1", "--out", "x"];
    assert!(fails(1, &plain).contains("--verify"));
    let both =
        ["export", "--model", &base, "--adapter", &adapter("lora_all"), "--adapter", &adapter("dora"), "--out", "x"];
    assert!(fails(1, &both).contains("magnitudes"));
    assert!(fails(1, &["export", "--model", &base, "--out", "x"]).contains("no adapter"));
}

#[test]
fn several_adapters_are_written_as_their_weighted_sum() {
    let temp = tempfile::tempdir().unwrap();
    let (base, out) = (base("llama_gqa_tied"), text(&temp.path().join("sum")));
    let (half, less) = (format!("{}@0.5", adapter("lora_all")), format!("{}@-0.7", adapter("rslora_patterns")));
    let ids = text(&golden().join("adapters/lora_all/expected.safetensors"));
    let logits = |adapters: &[&str], name: &str| {
        let target = temp.path().join(name);
        let written = text(&target);
        let mut args = vec!["logits", "--model", &base, "--ids", &ids, "--out", &written];
        adapters.iter().for_each(|a| args.extend(["--adapter", a]));
        ok(&args);
        MappedFile::open(&target).unwrap().load("logits", &Device::Cpu).unwrap()
    };
    let args = ["export", "--model", &base, "--adapter", &half, "--adapter", &less, "--verify", "--out", &out];
    let report = json(&args);
    assert!(report["max_difference"].as_f64().unwrap() < 1e-4, "{report}");
    let together = logits(&[&half, &less], "together.safetensors");
    assert!(difference(&logits(&[&out], "one.safetensors"), &together) < 1e-4);
    assert!(difference(&logits(&[], "none.safetensors"), &together) > 0.1);
}

#[test]
fn a_base_with_other_settings_is_refused_with_the_settings() {
    let temp = tempfile::tempdir().unwrap();
    let (model, ours) = (base("llama_gqa_tied"), text(&temp.path().join("ours")));
    ok(&["export", "--model", &model, "--adapter", &adapter("lora_all"), "--out", &ours]);
    let other = temp.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let source = golden().join("families/llama_gqa_tied");
    std::fs::copy(source.join("model.safetensors"), other.join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["rms_norm_eps"] = 0.25.into();
    config["rope_parameters"]["rope_theta"] = 77.0.into();
    std::fs::write(other.join("config.json"), config.to_string()).unwrap();
    let (ids, out) = (text(&golden().join("adapters/lora_all/expected.safetensors")), text(&temp.path().join("x")));
    let args = ["logits", "--model", &text(&other), "--adapter", &ours, "--ids", &ids, "--out", &out];
    let error = fails(1, &args);
    assert!(
        error.contains("other settings") && error.contains("epsilon 0.25") && error.contains("theta 77"),
        "{error}"
    );
    assert!(!error.contains("activation") && !error.contains("tied is"), "{error}");
    let merged = text(&temp.path().join("merged"));
    let error = fails(1, &["merge-into-base", "--model", &text(&other), "--adapter", &ours, "--out", &merged]);
    assert!(error.contains("epsilon 0.25"), "{error}");
    let forced: Vec<&str> = args.iter().copied().chain(["--allow-base", "--json"]).collect();
    let said = run(&forced);
    assert!(said.status.success() && String::from_utf8_lossy(&said.stderr).contains("other settings"));
}

#[test]
fn what_a_merge_keeps_in_coarser_storage_is_measured() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    let line = |i: u32| format!("{{\"input_ids\": [{i}, 5, 9, 11, 3], \"labels\": [-100, -100, 9, 11, 3]}}\n");
    std::fs::write(&rows, (1..7).map(line).collect::<String>()).unwrap();
    let (rows, out) = (text(&rows), temp.path().join("out"));
    let base = base("llama_gqa_tied");
    let more = ["--probe", &rows, "--requantize", "nf4,q8_0"];
    let report = json(&strs(&merge(&base, &adapter("lora_all"), &out, &more)));
    let gain = &report["gain"];
    let stored: Vec<&str> = gain["stored"].as_array().unwrap().iter().map(|s| s["storage"].as_str().unwrap()).collect();
    assert_eq!(stored, ["written", "nf4", "q8_0"]);
    // This adapter was not trained, so there is no gain on these rows, and that is said; the losses are there all the same.
    let (loss, adapted) = (gain["loss_base"].as_f64().unwrap(), gain["loss_adapted"].as_f64().unwrap());
    assert_eq!(gain["note"].is_null(), loss - adapted >= 1e-2, "{gain}");
    let nf4 = &gain["stored"][1];
    assert!(nf4["max_difference"].as_f64().unwrap() > 1e-3 && nf4["loss"].as_f64().unwrap() != adapted, "{gain}");
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("Gain of the adapters") && card.contains("Kept as q8"), "{card}");
    let refused =
        fails(1, &strs(&merge(&base, &adapter("lora_all"), &temp.path().join("x"), &["--requantize", "none"])));
    assert!(refused.contains("no quantised storage"), "{refused}");
    let rows_too_short = merge(&base, &adapter("lora_all"), &temp.path().join("x"), &["--requantize", "q4_k"]);
    let refused = fails(1, &strs(&rows_too_short));
    assert!(refused.contains("whole blocks of 256"), "{refused}");
    assert!(!temp.path().join("x").exists());
}

#[test]
fn a_base_that_was_not_checked_is_said() {
    let temp = tempfile::tempdir().unwrap();
    let ids = text(&golden().join("adapters/lora_all/expected.safetensors"));
    let out = text(&temp.path().join("x.safetensors"));
    let note = |base: &str, adapter: &str| {
        let run = run(&["logits", "--model", base, "--adapter", adapter, "--ids", &ids, "--out", &out, "--json"]);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        String::from_utf8(run.stderr).unwrap()
    };
    let said = note(&base("llama_gqa_tied"), &adapter("lora_all"));
    assert!(said.contains("not checked") && said.contains("as this model is named"), "{said}");
    let said = note(&base("qwen2"), &adapter("lora_layers"));
    assert!(said.contains("`families/llama_gqa_tied`, but this model is") && said.contains("qwen2"), "{said}");
    // Written here, the file holds the hash.
    let ours = text(&temp.path().join("ours"));
    ok(&["export", "--model", &base("llama_gqa_tied"), "--adapter", &adapter("lora_all"), "--out", &ours]);
    assert_eq!(note(&base("llama_gqa_tied"), &ours), "");
    // A run that goes on from such an adapter says it in its plan.
    let rows = temp.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"input_ids\": [1, 5, 9], \"labels\": [1, 5, 9]}\n").unwrap();
    let (model, rows) = (base("llama_gqa_tied"), text(&rows));
    let plan = |from: &str| json(&["check", "--model", &model, "--data", &rows, "--init-adapter", from]);
    assert!(plan(&adapter("lora_all"))["base_note"].as_str().unwrap().contains("not checked"));
    assert!(plan(&ours)["base_note"].is_null());
}
