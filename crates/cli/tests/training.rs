//! Training from the command line: the losses of PEFT from flags alone, and a run that survives being killed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{binary, fails, golden, json, ok, text};
use serde_json::Value;

fn steps(folder: &Path) -> Vec<Value> {
    let lines = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn flags_alone_give_the_losses_of_peft() {
    for case in ["llama_lora", "gpt2_dora", "phi3_lora"] {
        let curve = golden().join("curves").join(case);
        let expected: Value =
            serde_json::from_str(&std::fs::read_to_string(curve.join("losses.json")).unwrap()).unwrap();
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("run");
        let model = golden().join(expected["settings"]["base"].as_str().unwrap());
        let result = json(&[
            "train",
            "--model",
            &text(&model),
            "--init-adapter",
            &text(&curve.join("init")),
            "--data",
            &text(&curve.join("data.jsonl")),
            "--batch-size",
            "2",
            "--max-steps",
            "16",
            "--lr",
            "2e-3",
            "--weight-decay",
            "0.01",
            "--schedule",
            "constant",
            "--no-shuffle",
            "--max-grad-norm",
            "0",
            "--dtype",
            "f32",
            "--out",
            &text(&out),
        ]);
        assert_eq!(result["steps"], 16);
        let steps = steps(&out);
        assert_eq!(steps.len(), 16);
        for (i, step) in steps.iter().enumerate() {
            assert_eq!(step["step"], i + 1);
            let (ours, theirs) = (step["loss"].as_f64().unwrap(), expected["losses"][i].as_f64().unwrap());
            assert!((ours - theirs).abs() / theirs < 1e-4, "{case} step {i}: {ours} {theirs}");
        }
        for file in ["recipe.toml", "report.html", "adapter/adapter_config.json", "adapter/README.md"] {
            assert!(out.join(file).is_file(), "{file}");
        }
        let inspected = json(&["inspect", &text(&out.join("adapter"))]);
        assert_eq!(inspected["kind"], "adapter");
        assert_eq!(json(&["inspect", &text(&out)])["kind"], "run");
    }
}

fn arguments(data: &Path, out: &Path) -> Vec<String> {
    let model = text(&golden().join("families/llama_gqa_tied"));
    [
        "train",
        "--model",
        &model,
        "--data",
        &text(data),
        "--batch-size",
        "2",
        "--max-steps",
        "300",
        "--lr",
        "1e-3",
        "--r",
        "4",
        "--dropout",
        "0.1",
        "--save-every",
        "1",
        "--keep-checkpoints",
        "2",
        "--out",
        &text(out),
        "--json",
    ]
    .iter()
    .map(|s| (*s).to_owned())
    .collect()
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let data = golden().join("curves/llama_lora/data.jsonl");
    let whole = temp.path().join("whole");
    let arguments_whole = arguments(&data, &whole);
    ok(&arguments_whole.iter().map(String::as_str).collect::<Vec<_>>());
    let adapter = |out: &Path| std::fs::read(out.join("adapter/adapter_model.safetensors")).unwrap();
    let losses = |out: &Path| steps(out).iter().map(|s| s["loss"].to_string()).collect::<Vec<_>>();
    let parted = temp.path().join("parted");
    let mut kills = 0;
    let mut command = arguments(&data, &parted);
    // Each start is killed at another instant, checkpoint writes included: there is one after every step.
    for wait in [180, 97, 251, 140, 333, 73, 211, 167] {
        let mut child = binary().args(&command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(wait) && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(3));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
        if parted.join("recipe.toml").is_file() {
            command = ["train", "--resume", &text(&parted), "--json"].iter().map(|s| (*s).to_owned()).collect();
        }
    }
    assert!(kills >= 3, "only {kills} kills");
    ok(&command.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(losses(&whole), losses(&parted));
    assert!(adapter(&whole) == adapter(&parted), "the adapters differ");
    for folder in [&parted, &parted.join("checkpoints"), &parted.join("adapter")] {
        let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
        let hidden: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
        assert!(hidden.is_empty(), "the kills left {hidden:?}");
    }
}

#[test]
fn a_refused_resume_leaves_the_run_as_it_is_and_other_instructions_are_said() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("run");
    let mut first = arguments(&golden().join("curves/llama_lora/data.jsonl"), &out);
    first[8] = "5".into();
    let done = binary().args(&first).env("ESPALIER_SIMD", "baseline").output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let result: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(result["live"]["moved"], result["live"]["tensors"], "{result}");
    assert_eq!(result["reload"]["max_difference"], 0.0, "{result}");
    let recipe = || std::fs::read_to_string(out.join("recipe.toml")).unwrap();
    let before = recipe();
    let error = fails(1, &["train", "--resume", &text(&out), "--lr", "0.5"]);
    assert!(error.contains("lr: was 0.001, now 0.5"), "{error}");
    assert_eq!(recipe(), before);
    let again = binary().args(["train", "--resume", &text(&out)]).output().unwrap();
    let said = String::from_utf8_lossy(&again.stderr).into_owned() + &String::from_utf8_lossy(&again.stdout);
    assert!(again.status.success(), "{said}");
    assert!(said.contains("trainable tensors moved") && said.contains("adapter read back: same logits"), "{said}");
    let doctor = json(&["doctor"]);
    if doctor.to_string().contains("avx") {
        assert!(said.contains("CPU instructions baseline, now avx") && said.contains("bits may differ"), "{said}");
    }
}

#[test]
fn bad_input_gets_one_clear_error_and_leaves_files_whole() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&temp.path().join(name));
    let model = text(&golden().join("families/llama_gqa_tied"));
    let data = text(&golden().join("curves/llama_lora/data.jsonl"));
    let train = |extra: &[&str]| {
        let out = at("run");
        let base = ["train", "--max-steps", "2", "--out", out.as_str()];
        fails(1, &[&base, extra].concat())
    };
    std::fs::write(temp.path().join("empty.jsonl"), "").unwrap();
    let error = train(&["--model", &model, "--data", &at("empty.jsonl")]);
    assert!(error.contains("empty.jsonl"), "{error}");
    std::fs::write(temp.path().join("masked.jsonl"), "{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, -100]}\n")
        .unwrap();
    let error = train(&["--model", &model, "--data", &at("masked.jsonl")]);
    assert!(error.contains("masked.jsonl"), "{error}");
    std::fs::write(temp.path().join("large.jsonl"), "{\"input_ids\": [1, 2, 3000]}\n").unwrap();
    let error = train(&["--model", &model, "--data", &at("large.jsonl")]);
    assert!(error.contains("large.jsonl:1") && error.contains("3000"), "{error}");
    let error = train(&["--model", &at("nowhere"), "--data", &data]);
    assert!(error.contains("nowhere") && error.contains("hint:"), "{error}");
    let error = train(&["--model", &model, "--data", &data, "--target-modules", "q_prj"]);
    assert!(error.contains("q_prj") && error.contains("q_proj"), "{error}");
    let error = train(&["--model", &model, "--data", &data, "--method", "lorra"]);
    assert!(error.contains("did you mean `lora`"), "{error}");
    std::fs::write(temp.path().join("recipe.toml"), "batch_size = 2\nlerning_rate = 1\n").unwrap();
    let error = fails(1, &["train", &at("recipe.toml")]);
    assert!(error.contains("recipe.toml:2"), "{error}");
    fails(2, &["train", "--no-such-flag"]);
    assert!(!temp.path().join("run/adapter").exists());
}
