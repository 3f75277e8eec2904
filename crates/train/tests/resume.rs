//! A run that is stopped and continued gives the bits of the run that was not; what changed is refused; a full disk leaves
//! earlier checkpoints whole.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use espalier_adapters::formats::atomic::with_write_limit;
use espalier_train::checkpoint;
use espalier_train::observer::Observer;
use espalier_train::recipe::values::{DataList, DataSource};
use espalier_train::run::metrics::{self, Record, StepRecord};
use espalier_train::session::{self, SessionOptions};
use espalier_train::trainer::Scope;
use espalier_train::{Error, Recipe, Run, Silent};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden")
}

fn data(folder: &Path, rows: usize) -> PathBuf {
    let path = folder.join("data.jsonl");
    let lines: Vec<String> = (0..rows)
        .map(|i| {
            let ids: Vec<usize> = (0..6 + i % 7).map(|j| (i * 13 + j * 5 + 3) % 60).collect();
            let labels: Vec<i64> =
                ids.iter().enumerate().map(|(j, id)| if j < 2 { -100 } else { *id as i64 }).collect();
            serde_json::json!({"input_ids": ids, "labels": labels}).to_string()
        })
        .collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn recipe(folder: &Path, out: &str, adapter: &str) -> Recipe {
    Recipe {
        model: golden().join("families/llama_gqa_tied").display().to_string(),
        data: DataList(vec![DataSource { path: data(folder, 23).display().to_string(), weight: None }]),
        batch_size: 3,
        max_steps: Some(14),
        lr: 1e-2,
        schedule: "cosine".into(),
        save_every: 3,
        validation_split: 3.0,
        eval_every: 4,
        max_length: 32,
        seed: 5,
        device: "cpu".into(),
        load_best: false,
        out: folder.join(out).display().to_string(),
        adapter: adapter.parse().unwrap(),
        ..Recipe::default()
    }
}

/// Sets the stop flag after a step.
struct StopAfter<'a>(u64, &'a AtomicBool);

impl Observer for StopAfter<'_> {
    fn step(&mut self, record: &StepRecord) -> espalier_train::Result<()> {
        if record.step == self.0 {
            self.1.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

fn go(recipe: Recipe, resume: bool, stop_after: Option<u64>) -> espalier_train::Result<session::SessionOutcome> {
    let mut run = Run::prepare(recipe)?;
    let plan = run.plan(0)?;
    let options = SessionOptions { scope: Scope::Adapter, resume, overwrite: false, command: "test".into() };
    let stop = AtomicBool::new(false);
    match stop_after {
        Some(step) => session::run(&mut run, &plan, &options, &mut StopAfter(step, &stop), &stop),
        None => session::run(&mut run, &plan, &options, &mut Silent, &stop),
    }
}

fn losses(out: &str) -> Vec<(u64, String)> {
    metrics::read(Path::new(out).join("metrics.jsonl"))
        .unwrap()
        .iter()
        .map(|r| match r {
            Record::Step(s) => (s.step, format!("{:?} {:?} {:?}", s.loss, s.lr, s.grad_norm)),
            Record::Eval(e) => (e.step, format!("eval {:?}", e.eval_loss)),
        })
        .collect()
}

fn weights(out: &str) -> Vec<u8> {
    std::fs::read(Path::new(out).join("adapter/adapter_model.safetensors")).unwrap()
}

#[test]
fn stopping_and_going_on_changes_no_bit() {
    let variants = [
        ("method = 'lora'\nr = 4\ndropout = 0.1", false, 1),
        ("method = 'dora'\nr = 3\nbias = 'none'", true, 1),
        ("method = 'lora'\nr = 2\nrslora = true\ninit = 'pissa'", false, 2),
    ];
    for (adapter, packing, accumulation) in variants {
        for stop in [1, 5, 9] {
            let temp = tempfile::tempdir().unwrap();
            let with = |out: &str| Recipe { packing, accumulation, ..recipe(temp.path(), out, adapter) };
            let whole = with("whole");
            go(whole.clone(), false, None).unwrap();
            let parted = with("parted");
            let outcome = go(parted.clone(), false, Some(stop)).unwrap();
            assert!(outcome.outcome.stopped && outcome.outcome.steps == stop as usize);
            let outcome = go(parted.clone(), true, None).unwrap();
            assert_eq!(outcome.outcome.resumed_from, Some(stop as usize));
            assert_eq!(losses(&whole.out), losses(&parted.out), "{adapter}, stopped after {stop}");
            assert!(weights(&whole.out) == weights(&parted.out), "{adapter}, stopped after {stop}");
        }
    }
}

#[test]
fn a_run_made_of_something_else_is_refused_with_what_changed() {
    let temp = tempfile::tempdir().unwrap();
    let first = recipe(temp.path(), "run", "method = 'lora'");
    go(first.clone(), false, Some(4)).unwrap();
    let error = go(Recipe { lr: 2e-2, ..first.clone() }, true, None).unwrap_err();
    let Error::Changed { changes, .. } = error else { panic!("{error}") };
    assert!(changes.len() == 1 && changes[0].contains("lr") && changes[0].contains("0.02"), "{changes:?}");
    let file = PathBuf::from(&first.data.0[0].path);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen("[3,8", "[4,8", 1)).unwrap();
    let error = go(first.clone(), true, None).unwrap_err();
    assert!(matches!(&error, Error::Changed { changes, .. } if changes[0].contains("data")), "{error}");
    std::fs::write(&file, text).unwrap();
    let error = go(first.clone(), false, None).unwrap_err().to_string();
    assert!(error.contains("--resume"), "{error}");
    // Where checkpoints go and how often may change.
    go(Recipe { save_every: 5, keep_checkpoints: 9, ..first }, true, None).unwrap();
}

#[test]
fn a_full_disk_leaves_earlier_checkpoints_whole() {
    let temp = tempfile::tempdir().unwrap();
    let base = Recipe {
        validation_split: 0.0,
        save_every: 2,
        keep_checkpoints: 9,
        ..recipe(temp.path(), "whole", "method = 'lora'")
    };
    go(base.clone(), false, None).unwrap();
    let mut seen = 0;
    for limit in (0..200_000u64).step_by(9_973) {
        let out = temp.path().join(format!("full-{limit}")).display().to_string();
        let recipe = Recipe { out: out.clone(), ..base.clone() };
        let result = with_write_limit(limit, || go(recipe.clone(), false, None));
        let Err(error) = result else { continue };
        seen += 1;
        let text = error.to_string().to_lowercase();
        assert!(text.contains("space") || text.contains("storage") || text.contains("full"), "{text}");
        for (step, path) in checkpoint::list(&Path::new(&out).join("checkpoints")) {
            assert_eq!(checkpoint::read_state(&path).unwrap().step, step);
            let mut run = Run::prepare(recipe.clone()).unwrap();
            checkpoint::restore_parameters(&path, &run.parameters).unwrap();
            run.plan(0).unwrap();
        }
        // With space again the run goes on to the same bits.
        go(recipe, true, None).unwrap();
        assert!(weights(&out) == weights(&base.out), "limit {limit}");
    }
    assert!(seen > 5, "only {seen} runs met the limit");
}

#[test]
fn a_loss_that_is_not_a_number_stops_before_the_update() {
    let temp = tempfile::tempdir().unwrap();
    let recipe = Recipe {
        lr: 1e30,
        max_grad_norm: 0.0,
        save_every: 1,
        schedule: "constant".into(),
        ..recipe(temp.path(), "nan", "method = 'lora'")
    };
    let error = go(recipe.clone(), false, None).unwrap_err();
    let Error::NotFinite { step, checkpoint, .. } = &error else { panic!("{error}") };
    assert!(*step > 1 && checkpoint.contains("step-"), "{error}");
    assert!(checkpoint::read_state(Path::new(checkpoint)).is_ok());
    assert!(error.hint().unwrap().contains("learning rate"));
}
