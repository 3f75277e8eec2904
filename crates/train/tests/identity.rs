//! What a resumed run is checked against: a refusal writes nothing and says what differs; what may differ is said.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use common::{Watcher, family, golden, recipe, session, session_with, write_rows};
use espalier_train::run::metrics::StepRecord;
use espalier_train::{Error, Observer, Recipe, Result};
use serde_json::{Value, json};

/// Every file below a folder.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            files.extend(tree(&entry))
        } else {
            drop(files.insert(entry.clone(), std::fs::read(entry).unwrap()))
        }
    }
    files
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|e| e.unwrap().path()) {
        std::fs::copy(&entry, to.join(entry.file_name().unwrap())).unwrap();
    }
}

fn change_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    // Without the spaces that the file had.
    std::fs::write(path, value.to_string()).unwrap();
}

/// The lines of a refusal, which must leave every file as it was.
fn refused(recipe: &Recipe) -> String {
    let before = tree(Path::new(&recipe.out));
    let text = match session(recipe, true, None).unwrap_err() {
        Error::Changed { changes, .. } => changes.join("\n"),
        other => panic!("{other}"),
    };
    assert!(tree(Path::new(&recipe.out)) == before, "the refusal wrote something: {text}");
    text
}

/// What is said when the run goes on.
fn notices(recipe: &Recipe) -> Vec<String> {
    let mut watcher = Watcher::default();
    session_with(recipe, true, &mut watcher, &AtomicBool::new(false)).unwrap();
    watcher.notices
}

struct FailsAt(u64);

impl Observer for FailsAt {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if record.step == self.0 { Err(Error::recipe("observer", "failed")) } else { Ok(()) }
    }
}

/// A run with a checkpoint at step 2 and records up to step 4.
fn begun(dir: &Path) -> Recipe {
    let rows = dir.join("rows.jsonl");
    write_rows(&rows, 8);
    let recipe = Recipe { save_every: 2, max_steps: Some(6), ..recipe(&rows, &dir.join("run")) };
    session_with(&recipe, false, &mut FailsAt(4), &AtomicBool::new(false)).unwrap_err();
    recipe
}

#[test]
fn a_refused_resume_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = begun(dir.path());
    let metrics = || std::fs::read_to_string(dir.path().join("run/metrics.jsonl")).unwrap().lines().count();
    assert_eq!(metrics(), 4);
    let text = refused(&Recipe { lr: 0.5, ..recipe.clone() });
    assert!(text.contains("lr: was 0.005, now 0.5"), "{text}");
    // A checkpoint that cannot be read is a refusal too.
    let file = dir.path().join("run/checkpoints/step-000002/parameters.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let before = tree(&dir.path().join("run"));
    session(&recipe, true, None).unwrap_err();
    assert!(tree(&dir.path().join("run")) == before);
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(session(&recipe, true, None).unwrap().outcome.resumed_from, Some(2));
    assert_eq!(metrics(), 6);
}

#[test]
fn checkpoints_without_records_are_a_run_too() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = begun(dir.path());
    std::fs::remove_file(dir.path().join("run/metrics.jsonl")).unwrap();
    let before = tree(&dir.path().join("run"));
    let message = session(&recipe, false, None).unwrap_err().to_string();
    assert!(message.contains("--resume") && message.contains("--overwrite"), "{message}");
    assert!(tree(&dir.path().join("run")) == before);
}

#[test]
fn a_resume_without_a_checkpoint_says_that_it_starts_again() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = begun(dir.path());
    std::fs::remove_dir_all(dir.path().join("run/checkpoints")).unwrap();
    let said = notices(&recipe);
    assert!(said.iter().any(|n| n.contains("no checkpoint") && n.contains("from its beginning")), "{said:?}");
}

#[test]
fn keys_that_change_nothing_may_appear_on_resuming() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = begun(dir.path());
    assert_eq!(recipe.cache_dir, None);
    let cached = Recipe { cache_dir: Some(dir.path().join("cache").display().to_string()), ..recipe };
    assert_eq!(session(&cached, true, None).unwrap().outcome.resumed_from, Some(2));
}

#[test]
fn another_meaning_of_config_json_is_refused_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    copy_folder(Path::new(&family("llama_gqa_tied")), &base);
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let recipe = Recipe { model: base.display().to_string(), ..recipe(&rows, &dir.path().join("run")) };
    session(&recipe, false, Some(3)).unwrap();
    let config = base.join("config.json");
    let original = std::fs::read(&config).unwrap();
    change_json(&config, |c| c["rms_norm_eps"] = json!(0.5));
    let text = refused(&recipe);
    assert!(text.contains("config rms_norm_eps: was ") && text.contains(", now 0.5"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    // Another form and other remarks are the same model.
    std::fs::write(&config, original).unwrap();
    change_json(&config, |c| c["transformers_version"] = json!("99"));
    assert_eq!(session(&recipe, true, None).unwrap().outcome.resumed_from, Some(3));
}

#[test]
fn other_metadata_of_a_gguf_file_are_refused_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let names = std::fs::read_dir(golden().join("gguf")).unwrap().map(|e| e.unwrap().path());
    let file = names.filter(|p| p.extension().is_some_and(|e| e == "gguf")).min().unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let base = dir.path().join("base.gguf");
    std::fs::write(&base, &bytes).unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let recipe = Recipe { model: base.display().to_string(), ..recipe(&rows, &dir.path().join("run")) };
    session(&recipe, false, Some(3)).unwrap();
    let key = b"attention.layer_norm_rms_epsilon";
    // After the key: four bytes of a type, then the value as f32.
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&0.5f32.to_le_bytes());
    std::fs::write(&base, &bytes).unwrap();
    let text = refused(&recipe);
    assert!(text.contains("config rms_norm_eps") && text.lines().count() == 1, "{text}");
}

#[test]
fn the_start_adapter_counts_by_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let init = dir.path().join("init");
    copy_folder(&golden().join("curves/llama_lora/init"), &init);
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let curve: Value =
        serde_json::from_slice(&std::fs::read(golden().join("curves/llama_lora/losses.json")).unwrap()).unwrap();
    let recipe = Recipe {
        model: golden().join(curve["settings"]["base"].as_str().unwrap()).display().to_string(),
        adapter: toml::Table::new(),
        init_adapter: Some(init.display().to_string()),
        ..recipe(&rows, &dir.path().join("run"))
    };
    session(&recipe, false, Some(3)).unwrap();
    let config = init.join("adapter_config.json");
    let original = std::fs::read(&config).unwrap();
    change_json(&config, |c| c["lora_alpha"] = json!(999));
    let text = refused(&recipe);
    assert!(text.contains("init_adapter: content was sha256:") && text.lines().count() == 1, "{text}");
    std::fs::write(&config, original).unwrap();
    // The same adapter in another folder.
    let moved = dir.path().join("moved");
    std::fs::rename(&init, &moved).unwrap();
    let recipe = Recipe { init_adapter: Some(moved.display().to_string()), ..recipe };
    assert_eq!(session(&recipe, true, None).unwrap().outcome.resumed_from, Some(3));
}

#[test]
fn another_dtype_in_use_is_refused_and_other_kernels_are_said() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe { dtype: "auto".into(), ..begun(dir.path()) };
    let recipe = Recipe { out: dir.path().join("auto").display().to_string(), ..recipe };
    session(&recipe, false, Some(2)).unwrap();
    let state = dir.path().join("auto/checkpoints/step-000002/state.json");
    let original = std::fs::read(&state).unwrap();
    let written: Value = serde_json::from_slice(&original).unwrap();
    let machine = &written["identity"]["machine"];
    assert_eq!((&machine["dtype"], &machine["device"]), (&json!("f32"), &json!("cpu")), "{machine}");
    // As a run on a device would have resolved "auto".
    change_json(&state, |s| {
        s["identity"]["machine"]["dtype"] = json!("bf16");
        s["identity"]["machine"]["device"] = json!("cuda");
    });
    let text = refused(&recipe);
    assert_eq!(text, "  dtype in use: was bf16 on cuda, now f32 on cpu");
    std::fs::write(&state, &original).unwrap();
    let text = refused(&Recipe { dtype: "bf16".into(), ..recipe.clone() });
    assert_eq!(text, "  dtype in use: was f32 on cpu, now bf16 on cpu");
    change_json(&state, |s| s["identity"]["machine"]["instructions"] = json!("avx1024"));
    // "f32" is what "auto" stood for.
    let said = notices(&Recipe { dtype: "f32".into(), ..recipe.clone() });
    assert!(said.iter().any(|n| n.contains("instructions avx1024, now") && n.contains("bits may differ")), "{said:?}");
}

#[test]
fn a_checkpoint_of_an_earlier_version_goes_on_and_says_what_is_not_checked() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = begun(dir.path());
    change_json(&dir.path().join("run/checkpoints/step-000002/state.json"), |s| {
        let identity = s["identity"].as_object_mut().unwrap();
        for key in ["config", "init_adapter", "machine"] {
            assert!(identity.remove(key).is_some(), "{key}");
        }
    });
    let text = refused(&Recipe { dtype: "bf16".into(), ..recipe.clone() });
    assert_eq!(text, "  recipe dtype: was \"f32\", now \"bf16\"");
    let said = notices(&recipe);
    let said = said.iter().find(|n| n.contains("not checked")).unwrap();
    assert!(said.contains("config.json") && said.contains("init_adapter") && said.contains("dtype"), "{said}");
}
