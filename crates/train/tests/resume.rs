//! Stopping and going on: the same bits as without the stop, refusal after a change, and a full disk that harms nothing
//! written before.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::{Watcher, data, family, lora, recipe, session, session_with, source, write_rows};
use espalier_adapters::formats::atomic::with_write_limit;
use espalier_train::recipe::values::DataList;
use espalier_train::run::metrics::{self, Record, StepRecord};
use espalier_train::{Error, Observer, Recipe, Result, Silent, checkpoint};

fn adapter_bytes(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("adapter/adapter_model.safetensors")).unwrap()
}

/// What a record says, times and memory aside.
fn values(out: &Path) -> Vec<(u64, u64, bool, u64)> {
    metrics::read(out.join("metrics.jsonl"))
        .unwrap()
        .into_iter()
        .map(|record| match record {
            Record::Step(r) => (r.step, r.loss.to_bits(), false, r.grad_norm.unwrap().to_bits()),
            Record::Eval(r) => (r.step, r.eval_loss.to_bits(), true, r.eval_tokens),
        })
        .collect()
}

fn adapter(text: &str) -> toml::Table {
    text.parse().unwrap()
}

/// Recipes whose resumption must not show, by name.
fn cases(dir: &Path) -> Vec<(&'static str, Recipe)> {
    let rows = dir.join("rows.jsonl");
    write_rows(&rows, 14);
    let others = dir.join("others.jsonl");
    write_rows(&others, 9);
    let plain = recipe(&rows, &dir.join("unused"));
    let shuffled = Recipe { shuffle: true, seed: 11, adapter: lora(4, 0.1), ..plain.clone() };
    vec![
        ("plain", plain.clone()),
        ("cosine", Recipe { schedule: "cosine".into(), warmup_steps: Some(3), weight_decay: 0.1, ..plain.clone() }),
        ("accumulation", Recipe { accumulation: 3, ..plain.clone() }),
        ("packing", Recipe { packing: true, max_length: 32, ..shuffled.clone() }),
        (
            "dropout, shuffling, accumulation",
            Recipe { accumulation: 2, checkpointing: true, max_grad_norm: 0.1, ..shuffled.clone() },
        ),
        ("dora", Recipe { adapter: adapter("method = 'dora'\nr = 3"), packing: true, max_length: 32, ..plain.clone() }),
        (
            "pissa",
            Recipe { adapter: adapter("r = 2\nrslora = true\ninit = 'pissa'"), accumulation: 2, ..plain.clone() },
        ),
        (
            "an encoder of virtual tokens",
            Recipe {
                adapter: adapter(
                    "method = 'p_tuning'\nnum_virtual_tokens = 3\nencoder_hidden_size = 6\nnetwork = 'LSTM'\ndropout = 0.3",
                ),
                packing: true,
                max_length: 32,
                ..shuffled.clone()
            },
        ),
        (
            "projected keys and values",
            Recipe {
                adapter: adapter("method = 'prefix_tuning'\nnum_virtual_tokens = 3\nprefix_projection = true"),
                accumulation: 2,
                checkpointing: true,
                ..plain.clone()
            },
        ),
        ("penalty", Recipe { adapter: adapter("method = 'adalora'\nr = 3\ntinit = 100"), ..shuffled.clone() }),
        ("norms", Recipe { adapter: adapter("method = 'ln_tuning'"), ..plain.clone() }),
        ("mixture", Recipe { data: DataList(vec![source(&rows, 1.0), source(&others, 3.0)]), ..shuffled.clone() }),
        ("evaluation", Recipe { validation_split: 3.0, eval_every: 2, save_every: 3, ..shuffled.clone() }),
        ("epochs", Recipe { max_steps: None, epochs: 1.8, ..shuffled }),
    ]
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    for (name, recipe) in cases(dir.path()) {
        let at = |part: &str| Recipe { out: dir.path().join(name).join(part).display().to_string(), ..recipe.clone() };
        let whole = session(&at("whole"), false, None).unwrap();
        assert!(whole.outcome.steps > 5 && !whole.outcome.stopped, "{name}: {:?}", whole.outcome);
        let part = at("part");
        let first = session(&part, false, Some(5)).unwrap();
        assert!(first.outcome.stopped && first.outcome.steps == 5, "{name}: {:?}", first.outcome);
        assert_ne!(adapter_bytes(Path::new(&part.out)), adapter_bytes(Path::new(&at("whole").out)), "{name}");
        let second = session(&part, true, Some(8)).unwrap();
        assert_eq!((second.outcome.resumed_from, second.outcome.steps), (Some(5), 8), "{name}");
        let last = session(&part, true, None).unwrap();
        assert_eq!(last.outcome.resumed_from, Some(8), "{name}");
        let (a, b) = (Path::new(&part.out), dir.path().join(name).join("whole"));
        assert_eq!(adapter_bytes(a), adapter_bytes(&b), "{name}: adapters");
        assert_eq!(values(a), values(&b), "{name}: metrics");
        assert_eq!(last.outcome.best, whole.outcome.best, "{name}");
        assert_eq!(last.outcome.tokens, whole.outcome.tokens, "{name}");
        assert_eq!(last.outcome.trained_tokens, whole.outcome.trained_tokens, "{name}");
    }
}

/// Ends the run like a kill: right after the `n`-th checkpoint appeared.
struct KilledAt(usize);

impl Observer for KilledAt {
    fn checkpoint(&mut self, _: &Path) {
        self.0 -= 1;
        assert!(self.0 > 0, "killed");
    }
}

#[test]
fn a_kill_after_any_checkpoint_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 12);
    let recipe = Recipe {
        shuffle: true,
        adapter: lora(4, 0.1),
        validation_split: 2.0,
        eval_every: 2,
        save_every: 1,
        max_steps: Some(6),
        ..recipe(&rows, &dir.path().join("whole"))
    };
    session(&recipe, false, None).unwrap();
    for n in 1..=7 {
        let out = dir.path().join(format!("killed-{n}"));
        let killed = Recipe { out: out.display().to_string(), ..recipe.clone() };
        let flag = AtomicBool::new(false);
        let ended = catch_unwind(AssertUnwindSafe(|| session_with(&killed, false, &mut KilledAt(n), &flag)));
        assert!(ended.is_err(), "the run had fewer than {n} checkpoints");
        session(&killed, true, None).unwrap();
        assert_eq!(adapter_bytes(&out), adapter_bytes(Path::new(&recipe.out)), "checkpoint {n}");
        assert_eq!(values(&out), values(Path::new(&recipe.out)), "checkpoint {n}");
    }
}

#[test]
fn resuming_a_finished_run_writes_the_same_adapter_and_knows_its_loss() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 6);
    let recipe = recipe(&rows, &dir.path().join("run"));
    let whole = session(&recipe, false, None).unwrap();
    let bytes = adapter_bytes(Path::new(&recipe.out));
    std::fs::remove_dir_all(dir.path().join("run/adapter")).unwrap();
    let again = session(&recipe, true, None).unwrap();
    assert_eq!(adapter_bytes(Path::new(&recipe.out)), bytes);
    assert_eq!(again.outcome.steps, 12);
    assert_eq!(again.outcome.loss.to_bits(), whole.outcome.loss.to_bits());
}

#[test]
fn a_run_that_ended_early_stays_ended() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 12);
    let recipe = Recipe {
        lr: 1.0,
        validation_split: 3.0,
        eval_every: 1,
        early_stopping: 2,
        load_best: false,
        ..recipe(&rows, &dir.path().join("run"))
    };
    let first = session(&recipe, false, None).unwrap();
    assert!(first.outcome.early_stopped && first.outcome.steps < 12, "{:?}", first.outcome);
    let (bytes, seen) = (adapter_bytes(Path::new(&recipe.out)), values(Path::new(&recipe.out)));
    let again = session(&recipe, true, None).unwrap();
    assert!(again.outcome.early_stopped && again.outcome.steps == first.outcome.steps);
    assert_eq!(adapter_bytes(Path::new(&recipe.out)), bytes);
    assert_eq!(values(Path::new(&recipe.out)), seen);
}

#[test]
fn a_folder_with_a_run_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 6);
    let recipe = Recipe { max_steps: Some(2), ..recipe(&rows, &dir.path().join("run")) };
    session(&recipe, false, None).unwrap();
    let before = std::fs::read(dir.path().join("run/metrics.jsonl")).unwrap();
    let message = session(&recipe, false, None).unwrap_err().to_string();
    assert!(message.contains("--resume") && message.contains("--overwrite"), "{message}");
    assert_eq!(std::fs::read(dir.path().join("run/metrics.jsonl")).unwrap(), before);
}

#[test]
fn a_changed_recipe_data_or_base_is_refused_line_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, others) = (dir.path().join("rows.jsonl"), dir.path().join("others.jsonl"));
    write_rows(&rows, 8);
    write_rows(&others, 9);
    let base = dir.path().join("base");
    copy_folder(Path::new(&family("llama_gqa_tied")), &base);
    let recipe = Recipe { model: base.display().to_string(), ..recipe(&rows, &dir.path().join("run")) };
    session(&recipe, false, Some(5)).unwrap();
    let before = checkpoint::list(&dir.path().join("run/checkpoints"));
    assert_eq!(before.last().unwrap().0, 5);
    let changes = |changed: &Recipe| match session(changed, true, None).unwrap_err() {
        Error::Changed { changes, .. } => changes.join("\n"),
        other => panic!("{other}"),
    };
    let text = changes(&Recipe { lr: 0.25, seed: 9, ..recipe.clone() });
    assert!(text.contains("lr: was 0.005, now 0.25") && text.contains("seed: was 0, now 9"), "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
    let text = changes(&Recipe { adapter: lora(2, 0.0), ..recipe.clone() });
    assert!(text.contains("adapter"), "{text}");
    let text = changes(&Recipe { data: data(&others), ..recipe.clone() });
    assert!(text.contains("others.jsonl") && text.contains("data: content"), "{text}");
    // The same path with another content.
    std::fs::copy(&others, &rows).unwrap();
    let text = changes(&recipe);
    assert!(text.contains("data: content") && text.lines().count() == 1, "{text}");
    write_rows(&rows, 8);
    let weights = base.join("model.safetensors");
    let mut tensors = common::tensors(&weights);
    let name = "model.norm.weight";
    tensors.insert(name.into(), (&tensors[name] * 1.001).unwrap());
    common::write_tensors(&weights, &tensors);
    let text = changes(&recipe);
    assert!(text.contains("base model: content") && text.lines().count() == 1, "{text}");
    // Nothing was lost by the refusals, and what changes no value may change.
    assert_eq!(checkpoint::list(&dir.path().join("run/checkpoints")), before);
    copy_folder(Path::new(&family("llama_gqa_tied")), &base);
    let free = Recipe { save_every: 4, keep_checkpoints: 9, checkpointing: true, ..recipe };
    assert_eq!(session(&free, true, None).unwrap().outcome.resumed_from, Some(5));
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

#[test]
fn a_full_disk_is_a_clear_error_and_earlier_files_stay_whole() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let whole = Recipe { save_every: 2, ..recipe(&rows, &dir.path().join("whole")) };
    session(&whole, false, None).unwrap();
    let (mut at_once, mut later) = (0, 0);
    for kilobytes in [0, 1, 4, 20, 60, 100, 150, 200] {
        let out = dir.path().join(format!("full-{kilobytes}"));
        let recipe = Recipe { out: out.display().to_string(), ..whole.clone() };
        let Err(error) = with_write_limit(kilobytes << 10, || session(&recipe, false, None)) else { continue };
        let text = error.to_string().to_lowercase();
        assert!(text.contains("full-") && (text.contains("no storage space") || text.contains("no space")), "{text}");
        assert!(error.hint().is_some_and(|hint| hint.contains("free some space")), "{kilobytes}: {error:?}");
        let checkpoints = checkpoint::list(&out.join("checkpoints"));
        match checkpoints.is_empty() {
            true => at_once += 1,
            false => later += 1,
        }
        for (step, path) in checkpoints {
            assert_eq!(checkpoint::read_state(&path).unwrap().step, step);
        }
        let hidden = std::fs::read_dir(out.join("checkpoints")).into_iter().flatten().flatten();
        let left: Vec<_> = hidden.map(|e| e.file_name()).filter(|n| n.to_string_lossy().starts_with('.')).collect();
        assert!(left.is_empty(), "{left:?}");
        // With space again, the run goes on to the same end.
        session(&recipe, true, None).unwrap();
        assert_eq!(adapter_bytes(&out), adapter_bytes(Path::new(&whole.out)), "{kilobytes} KiB");
    }
    assert!(at_once > 0 && later > 1, "{at_once} failures before the first checkpoint, {later} after it");
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let recipe = recipe(&rows, &dir.path().join("run"));
    session(&recipe, false, Some(5)).unwrap();
    let folder = dir.path().join("run/checkpoints/step-000005");
    for name in ["parameters.safetensors", "optimizer.safetensors", "state.json"] {
        let bytes = std::fs::read(folder.join(name)).unwrap();
        std::fs::write(folder.join(name), &bytes[..bytes.len() / 2]).unwrap();
        let message = session(&recipe, true, None).unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    let file = folder.join("parameters.safetensors");
    let mut tensors = common::tensors(&file);
    let (first, tensor) = tensors.pop_first().unwrap();
    common::write_tensors(&file, &tensors);
    let message = session(&recipe, true, None).unwrap_err().to_string();
    assert!(message.contains(&first) && message.contains("missing"), "{message}");
    tensors.insert(first.clone(), tensor.flatten_all().unwrap());
    common::write_tensors(&file, &tensors);
    let message = session(&recipe, true, None).unwrap_err().to_string();
    assert!(message.contains(&first) && message.contains("shape"), "{message}");
}

/// An observer that cannot keep a record.
struct Refuses;

impl Observer for Refuses {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if record.step == 3 { Err(Error::recipe("observer", "refused")) } else { Ok(()) }
    }
}

#[test]
fn an_observer_that_fails_ends_the_run_and_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let whole = Recipe { save_every: 2, ..recipe(&rows, &dir.path().join("whole")) };
    session(&whole, false, None).unwrap();
    let recipe = Recipe { out: dir.path().join("run").display().to_string(), ..whole.clone() };
    let flag = AtomicBool::new(false);
    assert!(session_with(&recipe, false, &mut Refuses, &flag).unwrap_err().to_string().contains("refused"));
    let outcome = session_with(&recipe, true, &mut Silent, &flag).unwrap();
    assert_eq!(outcome.outcome.resumed_from, Some(2));
    assert_eq!(adapter_bytes(Path::new(&recipe.out)), adapter_bytes(Path::new(&whole.out)));
    assert_eq!(values(Path::new(&recipe.out)), values(Path::new(&whole.out)));
    // A stop before the first step's end leaves a checkpoint of it.
    let recipe = Recipe { out: dir.path().join("stopped").display().to_string(), ..whole };
    let flag = AtomicBool::new(true);
    let outcome = session_with(&recipe, false, &mut Watcher::default(), &flag).unwrap();
    assert!(outcome.outcome.stopped && outcome.outcome.steps == 1);
    assert_eq!(checkpoint::list(&dir.path().join("stopped/checkpoints")).len(), 1);
}
