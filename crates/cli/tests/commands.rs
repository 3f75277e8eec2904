//! Every command once on small models, and its refusals.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use candle_core::{Device, Tensor};
use common::{fails, golden, json, ok, text};
use espalier_adapters::formats::safetensors::TensorFile;

fn difference(file: &std::path::Path, expected: &Tensor) -> f32 {
    let ours = TensorFile::open(file).unwrap().load("logits", &Device::Cpu).unwrap();
    assert_eq!(ours.dims(), expected.dims());
    let differences = (ours - expected).unwrap().abs().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // NaN, which the maximum of a tensor passes over, is worse than any number.
    differences.into_iter().fold(0.0, |m, d| if d >= 0.0 { m.max(d) } else { f32::INFINITY })
}

#[test]
fn logits_are_those_of_the_reference() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out.safetensors");
    for (base, adapter) in
        [("llama_gqa_tied", Some("dora")), ("gpt2", Some("gpt2_lora")), ("bert", Some("bert_lora")), ("gemma2", None)]
    {
        let base = golden().join("families").join(base);
        let (expected, adapter) = match adapter {
            Some(name) => (golden().join("adapters").join(name), Some(golden().join("adapters").join(name))),
            None => (base.clone(), None),
        };
        let ids = text(&expected.join("expected.safetensors"));
        let (base, target) = (text(&base), text(&out));
        let mut args = vec!["logits", "--model", &base, "--ids", &ids, "--out", &target];
        let adapter = adapter.map(|a| text(&a));
        if let Some(adapter) = &adapter {
            args.extend(["--adapter", adapter]);
        }
        ok(&args);
        let expected = TensorFile::open(std::path::Path::new(&ids)).unwrap().load("logits", &Device::Cpu).unwrap();
        assert!(difference(&out, &expected) < 1e-4);
    }
}

#[test]
fn merging_writes_a_model_with_the_scores_of_the_adapter() {
    let temp = tempfile::tempdir().unwrap();
    for (base, name) in [
        ("llama_gqa_tied", "lora_all"),
        ("llama_gqa_tied", "lora_embedding"),
        ("gpt2", "gpt2_dora"),
        ("llama_gqa_tied", "pissa"),
    ] {
        let adapter = golden().join("adapters").join(name);
        let merged = temp.path().join(name);
        let report = json(&[
            "merge-into-base",
            "--model",
            &text(&golden().join("families").join(base)),
            "--adapter",
            &text(&adapter),
            "--out",
            &text(&merged),
        ]);
        assert!(report["max_difference"].as_f64().unwrap() < 1e-3 && report["adapter_effect"].as_f64().unwrap() > 0.0);
        let out = temp.path().join("out.safetensors");
        let ids = adapter.join("expected.safetensors");
        ok(&["logits", "--model", &text(&merged), "--ids", &text(&ids), "--out", &text(&out)]);
        let expected = TensorFile::open(&ids).unwrap().load("logits", &Device::Cpu).unwrap();
        let d = difference(&out, &expected);
        assert!(d < 1e-3, "{name}: {d}");
    }
    let base = text(&golden().join("families/llama_gqa_tied"));
    let error = fails(1, &["merge-into-base", "--model", &base, "--out", &text(&temp.path().join("x"))]);
    assert!(error.contains("--adapter"), "{error}");
}

#[test]
fn quickstart_runs_and_reports() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("quick");
    let found = json(&["quickstart", "--steps", "6", "--test-rows", "2", "--out", &text(&out)]);
    for key in ["accuracy_before", "accuracy_after", "seconds", "adapter", "report"] {
        assert!(!found[key].is_null(), "{key} is missing in {found}");
    }
    assert_eq!(found["accuracy_before"], 0.0);
    assert!(std::path::Path::new(found["report"].as_str().unwrap()).is_file());
    // Again over what the first one left.
    json(&["quickstart", "--steps", "3", "--test-rows", "2", "--out", &text(&out)]);
}

#[test]
#[ignore = "takes a minute on two cores"]
fn quickstart_reaches_ninety_percent_within_ninety_seconds() {
    let temp = tempfile::tempdir().unwrap();
    let found = json(&["quickstart", "--out", &text(&temp.path().join("quick"))]);
    assert!(found["accuracy_before"].as_f64().unwrap() < 0.05, "{found}");
    assert!(found["accuracy_after"].as_f64().unwrap() > 0.9, "{found}");
    assert!(found["seconds"].as_f64().unwrap() < 90.0, "{found}");
}

#[test]
fn text_is_made_evaluated_and_generated() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    let written = json(&["synth", "--skill", "copy", "--samples", "6", "--out", &text(&rows)]);
    assert_eq!(written["rows"], 6);
    let score = json(&["eval", "--data", &text(&rows)]);
    assert!(score["loss"].as_f64().unwrap() < 4.0, "{score}");
    let answers = json(&["eval", "--data", &text(&rows), "--metric", "exact-match", "--max-new-tokens", "24"]);
    assert!(answers["accuracy"].as_f64().is_some(), "{answers}");
    let one = json(&["generate", "--prompt", "The dog", "--max-new-tokens", "8"]);
    assert_eq!(one, {
        let mut again = json(&["generate", "--prompt", "The dog", "--max-new-tokens", "8"]);
        again["stats"] = one["stats"].clone();
        again["tokens_per_s"] = one["tokens_per_s"].clone();
        again
    });
    assert!(ok(&["generate", "--prompt", "The dog", "--max-new-tokens", "8"]).starts_with("The dog"));
    let folder = temp.path().join("tokenizer");
    let many = temp.path().join("many.jsonl");
    ok(&["synth", "--samples", "200", "--out", &text(&many)]);
    let made = json(&["tokenizer", "--data", &text(&many), "--vocab-size", "400", "--out", &text(&folder)]);
    assert_eq!(made["tokens"], 400);
    let config = temp.path().join("config.json");
    let json_text = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 400, "max_position_embeddings": 128, "tie_word_embeddings": true}"#;
    std::fs::write(&config, json_text).unwrap();
    let run = temp.path().join("run");
    let trained = json(&[
        "pretrain",
        "--architecture",
        &text(&config),
        "--tokenizer",
        &text(&folder),
        "--data",
        &text(&many),
        "--max-steps",
        "4",
        "--batch-size",
        "4",
        "--packing",
        "--max-length",
        "64",
        "--lr",
        "1e-2",
        "--out",
        &text(&run),
    ]);
    let model = trained["model"].as_str().unwrap();
    let score = json(&["eval", "--model", model, "--data", &text(&rows), "--whole-rows"]);
    assert!(score["loss"].as_f64().unwrap() > 0.0);
    let exported = temp.path().join("half");
    ok(&["export", "--model", model, "--form", "model", "--save-dtype", "bf16", "--out", &text(&exported)]);
    assert_eq!(json(&["inspect", &text(&exported)])["kind"], "model");
}

#[test]
fn quantised_bases_train() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    ok(&["synth", "--skill", "labels", "--samples", "32", "--out", &text(&rows)]);
    for kind in ["nf4", "nf4-double", "int8"] {
        let out = temp.path().join(kind);
        json(&[
            "train",
            "--quantization",
            kind,
            "--data",
            &text(&rows),
            "--batch-size",
            "8",
            "--max-steps",
            "4",
            "--lr",
            "5e-3",
            "--schedule",
            "constant",
            "--out",
            &text(&out),
        ]);
        let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let loss: Vec<f64> = metrics
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap())
            .collect();
        assert!(loss.last() < loss.first(), "{kind}: {loss:?}");
    }
}

#[test]
fn check_says_what_will_happen() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    ok(&["synth", "--skill", "slots", "--samples", "5", "--out", &text(&rows)]);
    let plan = json(&["check", "--data", &text(&rows), "--r", "4", "--target-modules", "q_proj,v_proj"]);
    assert_eq!(plan["sites"].as_array().unwrap().len(), 8);
    assert_eq!(plan["patterns"][0], serde_json::json!(["q_proj", 4]));
    assert!(plan["memory"]["total"].as_u64().unwrap() > 0);
    let shown = ok(&["check", "--data", &text(&rows)]);
    assert!(shown.contains("[") && shown.contains("rank"), "{shown}");
}

#[test]
fn the_rest_answers() {
    assert_eq!(json(&["doctor"])["ok"], true);
    for shell in ["bash", "zsh", "fish", "man"] {
        assert!(ok(&["completions", shell]).contains("espalier"));
    }
    assert!(fails(1, &["completions", "tcl"]).contains("error:"));
    assert!(ok(&["train", "--help"]).contains("--weight-decay"));
    fails(2, &["generat"]);
    let base = text(&golden().join("families/gpt2"));
    let adapter = text(&golden().join("adapters/dora"));
    let ids = text(&golden().join("adapters/dora/expected.safetensors"));
    let error = fails(1, &["logits", "--model", &base, "--adapter", &adapter, "--ids", &ids, "--out", "x.safetensors"]);
    assert!(error.contains("matches no module"), "{error}");
    let size = std::fs::metadata(env!("CARGO_BIN_EXE_espalier")).unwrap().len();
    assert!(size < 40 << 20 || cfg!(debug_assertions), "{size} bytes");
}

#[test]
fn an_unknown_instruction_set_is_refused_before_anything_runs() {
    let run = |level: &str| common::binary().env("ESPALIER_SIMD", level).args(["doctor"]).output().unwrap();
    let out = run("avx9");
    assert_eq!(out.status.code(), Some(2));
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(message.contains("ESPALIER_SIMD=avx9") && message.contains("avx512bf16"), "{message}");
    let out = run("baseline");
    assert!(String::from_utf8_lossy(&out.stdout).contains("with baseline kernels"));
}
