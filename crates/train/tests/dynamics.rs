//! Every dynamics of the list, in each of its examples: it trains, a stopped run goes on to the same bits, its settings are part
//! of what a run is, and what does not go together is refused before any work.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::path::Path;

use common::{data, family, lora, recipe, session, write_rows};
use espalier_train::dynamics::{DYNAMICS, DynamicsConfig};
use espalier_train::run::metrics::{self, Record};
use espalier_train::{Error, Recipe, Run};

fn table(text: &str) -> toml::Table {
    text.parse().unwrap()
}

/// Every example as a run on `rows`, by name.
fn cases(rows: &Path, out: &Path) -> Vec<(String, Recipe)> {
    DynamicsConfig::examples()
        .into_iter()
        .map(|(name, config, adapter)| {
            let dynamics = toml::Table::try_from(&config).unwrap();
            let base = Recipe {
                schedule: "linear".into(),
                weight_decay: 0.05,
                shuffle: true,
                // Rows that are trained on: what is asked here is whether training works.
                eval_data: data(rows),
                eval_every: 3,
                max_steps: Some(9),
                lr: 2e-3,
                accumulation: 2,
                ..recipe(rows, &out.join(name.replace([' ', ','], "-")))
            };
            (name, Recipe { adapter: table(adapter), dynamics, ..base })
        })
        .collect()
}

/// The tensors that a run leaves: an adapter's, or a model's.
fn result(out: &Path) -> Vec<u8> {
    let adapter = out.join("adapter/adapter_model.safetensors");
    let model = out.join("model/model.safetensors");
    assert_ne!(adapter.is_file(), model.is_file(), "{}: one of both is the result", out.display());
    std::fs::read(if adapter.is_file() { adapter } else { model }).unwrap()
}

/// What the records of a run say, times and memory aside.
fn records(out: &Path) -> Vec<String> {
    let records = metrics::read(out.join("metrics.jsonl")).unwrap();
    records
        .into_iter()
        .map(|record| match record {
            Record::Step(r) => {
                let extra = serde_json::to_string(&r.extra).unwrap();
                format!(
                    "{} {:x} {:x} {:x} {extra}",
                    r.step,
                    r.loss.to_bits(),
                    r.lr.to_bits(),
                    r.grad_norm.unwrap().to_bits()
                )
            }
            Record::Eval(r) => format!("{} {:x}", r.step, r.eval_loss.to_bits()),
        })
        .collect()
}

#[test]
fn a_stopped_run_of_every_dynamics_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 24);
    let cases = cases(&rows, dir.path());
    for name in DYNAMICS {
        assert!(cases.iter().any(|(case, _)| case.starts_with(&format!("{name} "))), "{name} has no example");
    }
    for (name, whole) in cases {
        let ended = session(&whole, false, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        let out = Path::new(&whole.out);
        let part = Recipe { out: format!("{}-part", whole.out), ..whole.clone() };
        for stop in [Some(4), Some(7), None] {
            let resume = stop != Some(4);
            session(&part, resume, stop).unwrap_or_else(|e| panic!("{name}, {stop:?}: {e}"));
        }
        let parted = Path::new(&part.out);
        assert_eq!(records(parted), records(out), "{name}");
        assert!(result(parted) == result(out), "{name}: another result");
        let first = metrics::read(out.join("metrics.jsonl")).unwrap();
        let losses: Vec<f64> =
            first.iter().filter_map(|r| if let Record::Eval(e) = r { Some(e.eval_loss) } else { None }).collect();
        eprintln!("{name:45} evaluation {losses:.4?}; {}", ended.outcome.live.unwrap());
        assert!(losses.len() == 3 && losses[2] < losses[0], "{name}: did not get better: {losses:?}");
    }
}

#[test]
fn other_settings_are_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let with = |text: &str| Recipe { dynamics: table(text), ..recipe(&rows, &dir.path().join("run")) };
    session(&with("method = 'lora-plus'\nratio = 4"), false, Some(5)).unwrap();
    for text in ["method = 'lora-plus'\nratio = 5", "", "method = 'lora-fa'"] {
        match session(&with(text), true, None).unwrap_err() {
            Error::Changed { changes, .. } => {
                assert!(changes.len() == 1 && changes[0].contains("recipe dynamics"), "{text}: {changes:?}");
            }
            other => panic!("{text}: {other}"),
        }
    }
    session(&with("method = 'lora-plus'\nratio = 4"), true, None).unwrap();
}

#[test]
fn what_does_not_go_together_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let full = "method = 'full'";
    for (dynamics, adapter, reason) in [
        ("method = 'lora-pro'", "method = 'vera'\nr = 4", "no product B A"),
        ("method = 'lora-pro'", "method = 'dora'", "more than a product"),
        ("method = 'lora-pro'", full, "no product B A"),
        ("method = 'lora-fa'", full, "no product B A"),
        ("method = 'lora-plus'", full, "no low-rank product"),
        ("method = 'allora'", "r = 8\nalpha = 16", "set alpha to the rank"),
        ("method = 'allora'", "r = 8\nalpha = 8\ndropout = 0.1", "set dropout to 0"),
        ("method = 'allora'", "r = 4\nalpha = 4\ntarget_modules = ['embed_tokens']", "looks up rows"),
        ("method = 'lisa'", "method = 'lora'", "it goes with `full`"),
        ("method = 'switchlora'", "init = 'pissa'\nr = 4", "moved a part of the base"),
        ("method = 'switchlora'", "r = 512", "below both sides"),
        ("method = 'relora'", full, "no product B A"),
        ("method = 'relora'\nevery = 5\nrewarm = 5", "r = 4", "no fewer than"),
        ("method = 'galore'", "method = 'lora'", "dense weights"),
        ("method = 'galore'", full, "above the rank of 128"),
        ("method = 'dylora'", "method = 'lora'", "not nested"),
        ("method = 'dylora'\nleast = 9", "method = 'dylora'\nr = 8", "above the adapter's rank"),
        ("method = 'dylora'\nstrict = true\nper_micro_batch = true", "method = 'dylora'", "held still"),
        ("method = 'switchlora'\ninterval = 3", "r = 4", "twice the 5 steps"),
    ] {
        let recipe =
            Recipe { dynamics: table(dynamics), adapter: table(adapter), ..recipe(&rows, &dir.path().join("run")) };
        let message = Run::prepare(recipe).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(reason) && message.contains("dynamics."), "{dynamics}, {adapter}: {message}");
    }
    for dynamics in ["relora", "switchlora"] {
        let recipe = Recipe {
            dynamics: table(&format!("method = '{dynamics}'")),
            adapter: lora(4, 0.0),
            quantization: "int8".into(),
            model: family("llama1"),
            ..recipe(&rows, &dir.path().join("run"))
        };
        let message = Run::prepare(recipe).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("int8") && message.contains("use f32"), "{message}");
    }
    assert!(!dir.path().join("run").exists());
}
