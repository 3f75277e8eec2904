//! What a run must leave behind: tensors that moved, an adapter that reads back, a best evaluation that is a number, and a
//! folder in which nothing of a killed or earlier run is mistaken for its own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Tensor};
use common::{Watcher, data, family, lora, recipe, session, session_with, tensors, write_rows, write_tensors};
use espalier_adapters::AdapterSet;
use espalier_adapters::formats::folder;
use espalier_data::TextCodec;
use espalier_models::{LoadOptions, Model};
use espalier_train::session::{self, SessionOptions};
use espalier_train::trainer::Scope;
use espalier_train::verify::Probe;
use espalier_train::{Error, Recipe, Run, checkpoint, merge, reload};

/// A copy of a golden model with one tensor changed.
fn changed_base(name: &str, to: &Path, tensor: &str, change: impl FnOnce(&Tensor) -> Tensor) -> String {
    let from = PathBuf::from(family(name));
    std::fs::create_dir_all(to).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let mut all = tensors(&from.join("model.safetensors"));
    let changed = change(&all[tensor]);
    all.insert(tensor.to_owned(), changed);
    write_tensors(&to.join("model.safetensors"), &all);
    to.display().to_string()
}

/// The token table with NaN in the row of `token`.
fn poisoned(table: &Tensor, token: usize) -> Tensor {
    let (rows, width) = table.dims2().unwrap();
    let mut values = table.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[token * width..(token + 1) * width].fill(f32::NAN);
    Tensor::from_vec(values, (rows, width), table.device()).unwrap()
}

fn hidden(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn an_evaluation_that_is_no_number_is_never_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let eval = dir.path().join("eval.jsonl");
    std::fs::write(&eval, "{\"input_ids\": [1, 2, 63, 3, 4]}\n").unwrap();
    // Token 63 is in no training row (ids up to 62), and the head of this model is another table.
    let table = "model.embed_tokens.weight";
    let model = changed_base("llama1", &dir.path().join("base"), table, |t| poisoned(t, 63));
    let out = dir.path().join("run");
    let recipe = Recipe { model, eval_data: data(&eval), eval_every: 2, max_steps: Some(6), ..recipe(&rows, &out) };
    let mut watcher = Watcher::default();
    let outcome = session_with(&recipe, false, &mut watcher, &AtomicBool::new(false)).unwrap().outcome;
    assert_eq!(outcome.best, None);
    assert!(watcher.evaluations.len() == 3 && watcher.evaluations[0].eval_loss.is_nan());
    assert!(watcher.notices.iter().any(|n| n.contains("evaluation at step 2 gave NaN")), "{:?}", watcher.notices);
    let newest = checkpoint::list(&out.join("checkpoints")).pop().unwrap().1;
    assert_eq!(checkpoint::read_state(&newest).unwrap().best, None);
    // As earlier versions wrote it.
    let state = newest.join("state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let old = text.replace("\"best\": null", "\"best\": {\"step\": 2, \"loss\": null}");
    assert_ne!(old, text);
    std::fs::write(&state, old).unwrap();
    assert_eq!(session(&recipe, true, None).unwrap().outcome.resumed_from, Some(6));
}

#[test]
fn the_only_checkpoint_survives_a_kill_between_two_renames() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let whole = Recipe { keep_checkpoints: 1, ..recipe(&rows, &dir.path().join("whole")) };
    session(&whole, false, None).unwrap();
    let out = dir.path().join("run");
    let recipe = Recipe { out: out.display().to_string(), ..whole.clone() };
    session(&recipe, false, Some(5)).unwrap();
    let checkpoints = out.join("checkpoints");
    std::fs::rename(checkpoints.join("step-000005"), checkpoints.join(".step-000005.4000001.old")).unwrap();
    for left in ["checkpoints/.step-000005.4000001.tmp", "checkpoints/.step-000004.4000002.old"] {
        std::fs::create_dir(out.join(left)).unwrap();
        std::fs::write(out.join(left).join("state.json"), "{").unwrap();
    }
    std::fs::create_dir(checkpoints.join("step-000004")).unwrap();
    for left in [".recipe.toml.4000001.tmp", "adapter/.README.md.4000001.tmp"] {
        std::fs::write(out.join(left), "half").unwrap();
    }
    let mut watcher = Watcher::default();
    let ended = session_with(&recipe, true, &mut watcher, &AtomicBool::new(false)).unwrap();
    assert_eq!(ended.outcome.resumed_from, Some(5));
    let said = watcher.notices.join("\n");
    assert!(said.contains("step-000005 was put back") && said.contains("2 unfinished"), "{said}");
    for folder in [&out, &checkpoints, &out.join("adapter")] {
        assert!(hidden(folder).is_empty(), "{:?}", hidden(folder));
    }
    let adapter = |out: &Path| std::fs::read(out.join("adapter/adapter_model.safetensors")).unwrap();
    assert!(adapter(&out) == adapter(Path::new(&whole.out)));
}

#[test]
fn a_run_begun_anew_shows_no_earlier_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let out = dir.path().join("run");
    let recipe = recipe(&rows, &out);
    session(&recipe, false, None).unwrap();
    std::fs::write(out.join("adapter/notes.txt"), "mine").unwrap();
    std::fs::create_dir(out.join("model")).unwrap();
    std::fs::write(out.join("model/model.safetensors"), "old").unwrap();
    struct Killed;
    impl espalier_train::Observer for Killed {
        fn start(&mut self, _: usize, _: usize) {
            panic!("killed");
        }
    }
    let anew = Recipe { adapter: lora(2, 0.0), ..recipe };
    let mut run = Run::prepare(anew).unwrap();
    let plan = run.plan(0).unwrap();
    let options = SessionOptions {
        scope: Scope::Adapter,
        resume: false,
        overwrite: true,
        allow_memory: false,
        command: String::new(),
    };
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        session::run(&mut run, &plan, &options, &mut Killed, &AtomicBool::new(false))
    }));
    assert!(ended.is_err());
    let text = std::fs::read_to_string(out.join("recipe.toml")).unwrap();
    assert!(text.contains("r = 2"), "{text}");
    let left: Vec<_> = std::fs::read_dir(out.join("adapter")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["notes.txt"]);
    assert!(!out.join("model").exists());
}

fn adapter(text: &str) -> toml::Table {
    text.parse().unwrap()
}

#[test]
fn trained_token_rows_may_be_absent_from_a_window() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    let row = |ids: &str| format!("{{\"input_ids\": [{ids}]}}\n");
    // Token 60 is in the fifth window only, token 61 in none.
    let text = row("3, 4, 5, 6").repeat(4) + &row("3, 60, 5, 6") + &row("7, 8, 9").repeat(3);
    std::fs::write(&rows, text).unwrap();
    let with = |tokens: &str, out: &str| Recipe {
        model: family("llama1"),
        batch_size: 1,
        weight_decay: 0.1,
        max_steps: Some(8),
        adapter: adapter(&format!("r = 2\ntarget_modules = ['q_proj']\ntrainable_tokens = {tokens}")),
        ..recipe(&rows, &dir.path().join(out))
    };
    let live = session(&with("[60, 61]", "run"), false, None).unwrap().outcome.live.unwrap();
    assert_eq!((live.steps, live.moved + 1), (3, live.tensors), "{live}");
    assert!(live.still.len() == 1 && live.still[0].reason.contains("none of its tokens"), "{live}");
    // Absent rows have a gradient of 0, as in PEFT: moments and decay go on, whoever else is in the window.
    session(&with("[60, 3]", "both"), false, None).unwrap();
    let saved = |out: &str| tensors(&dir.path().join(out).join("adapter/adapter_model.safetensors"));
    let values = |out: &str| {
        let all = saved(out);
        let (_, rows) = all.iter().find(|(name, _)| name.contains("trainable_tokens")).unwrap();
        rows.to_vec2::<f32>().unwrap()
    };
    let start = tensors(&Path::new(&family("llama1")).join("model.safetensors"))["model.embed_tokens.weight"].clone();
    let start = start.to_vec2::<f32>().unwrap();
    let (alone, both) = (values("run"), values("both"));
    assert!(alone[0] != start[60] && alone[1] != start[61], "decay moves absent rows");
    // The gradients differ a little by the other row's part, the decay of the first four steps does not.
    assert!(both[0].iter().zip(&alone[0]).all(|(a, b)| (a - b).abs() < 1e-3), "{both:?}\n{alone:?}");
}

#[test]
fn a_tensor_that_is_not_trained_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    // What queries and values of the first block give is multiplied by nothing.
    let dead = "model.layers.0.self_attn.o_proj.weight";
    let model = changed_base("llama_gqa_tied", &dir.path().join("base"), dead, |t| t.zeros_like().unwrap());
    let recipe =
        Recipe { adapter: adapter("r = 2\ntarget_modules = ['q_proj']"), ..recipe(&rows, &dir.path().join("run")) };
    for (max_steps, resume) in [(12, false), (2, false), (2, true)] {
        let recipe = Recipe {
            model: model.clone(),
            out: dir.path().join(format!("dead-{max_steps}")).display().to_string(),
            max_steps: Some(max_steps),
            ..recipe.clone()
        };
        match session(&recipe, resume, None).unwrap_err() {
            Error::NotTrained { steps, tensors } => {
                assert_eq!(steps, max_steps.min(3));
                assert_eq!(tensors.len(), 2, "{tensors:?}");
                assert!(tensors.iter().all(|t| t.contains("layers.0.") && t.contains("gradient of 0")), "{tensors:?}");
            }
            other => panic!("{other}"),
        }
        assert!(!Path::new(&recipe.out).join("adapter").exists());
    }
}

#[test]
fn every_start_is_watched_and_lawful_stillness_has_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let live = |name: &str, recipe: Recipe| {
        let out = dir.path().join(name).display().to_string();
        let ended = session(&Recipe { out, ..recipe }, false, None).unwrap();
        let page = std::fs::read_to_string(&ended.report).unwrap();
        let live = ended.outcome.live.unwrap();
        assert!(page.contains(&live.to_string().replace(">", "&gt;")), "{name}: {live}");
        assert_eq!(live.moved + live.still.iter().map(|s| s.tensors.len()).sum::<usize>(), live.tensors, "{name}");
        live
    };
    let plain = recipe(&rows, &dir.path().join("unused"));
    for (name, adapter_of) in [
        ("lora", "r = 2\ntarget_modules = 'all-linear'"),
        ("dora", "method = 'dora'\nr = 2"),
        ("pissa", "r = 2\ninit = 'pissa'"),
        ("full", "method = 'full'\ntarget_modules = ['q_proj']"),
        ("embedding", "r = 2\ntarget_modules = ['embed_tokens', 'v_proj']"),
        ("saved", "r = 2\nmodules_to_save = ['norm']"),
    ] {
        let found = live(name, Recipe { adapter: adapter(adapter_of), ..plain.clone() });
        assert!(found.still.is_empty() && found.steps == 3 && found.tensors > 0, "{name}: {found}");
    }
    // The first step of a warm-up has a learning rate of 0; three steps are enough all the same.
    let warm = live("warm-up", Recipe { warmup_steps: Some(100), schedule: "linear".into(), ..plain.clone() });
    assert!(warm.still.is_empty(), "{warm}");
    let one = live("one step", Recipe { max_steps: Some(1), ..plain.clone() });
    assert!(one.steps == 1 && 2 * one.moved == one.tensors, "{one}");
    assert!(one.still[0].reason.contains("other factor") && one.still[0].tensors.len() == one.moved, "{one}");
    let none = live("rate of 0", Recipe { lr: 0.0, ..plain.clone() });
    assert!(none.moved == 0 && none.still.len() == 1 && none.still[0].reason == "the learning rate was 0", "{none}");
    let tiny = adapter("r = 2\nmodules_to_save = ['norm']");
    let tiny = live("tiny rate", Recipe { lr: 1e-12, adapter: tiny, ..plain.clone() });
    assert!(tiny.still.iter().any(|s| s.reason.contains("rounding")), "{tiny}");
    // After a resume the watch begins anew.
    let parted = Recipe { out: dir.path().join("parted").display().to_string(), ..plain };
    session(&parted, false, Some(5)).unwrap();
    let live = session(&parted, true, None).unwrap().outcome.live.unwrap();
    assert!(live.steps == 3 && live.still.is_empty(), "{live}");
    assert_eq!(session(&parted, true, None).unwrap().outcome.live, Some(live));
}

#[test]
fn the_saved_adapter_reads_back_to_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    for (name, base, text, exact) in [
        ("lora", "llama_gqa_tied", "r = 4\nrslora = true", true),
        ("dora", "mistral", "method = 'dora'\nr = 2", true),
        ("full", "llama_gqa_tied", "method = 'full'\ntarget_modules = ['q_proj']", true),
        ("gpt2", "gpt2", "r = 2\nmodules_to_save = ['wte']", true),
        ("rows", "llama1", "r = 2\ntrainable_tokens = [3, 4, 61]", true),
        ("pissa", "llama_gqa_tied", "r = 2\ninit = 'pissa'", false),
        ("olora", "llama_gqa_tied", "method = 'dora'\nr = 2\ninit = 'olora'", false),
    ] {
        let out = dir.path().join(name);
        let recipe = Recipe { model: family(base), adapter: adapter(text), max_steps: Some(4), ..recipe(&rows, &out) };
        let ended = session(&recipe, false, None).unwrap();
        let reload = ended.reload.unwrap();
        assert!(reload.probe_tokens >= 8, "{name}: {reload:?}");
        assert!(reload.max_difference <= reload.limit, "{name}: {reload:?}");
        assert!(!exact || (reload.limit == 0.0 && reload.max_difference == 0.0), "{name}: {reload:?}");
        let page = std::fs::read_to_string(&ended.report).unwrap();
        assert!(page.contains("Adapter read back"), "{name}");
    }
}

#[test]
fn an_adapter_that_reads_back_differently_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let (mut run, _) = common::train(Recipe { max_steps: Some(4), ..recipe(&rows, &dir.path().join("unused")) });
    let path = dir.path().join("adapter");
    run.save_adapter(&path).unwrap();
    let before = reload::check(&mut run, &path).unwrap();
    assert_eq!(before.max_difference, 0.0);
    let config = path.join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let other = text.replace("\"lora_alpha\": 16", "\"lora_alpha\": 17");
    assert_ne!(other, text);
    std::fs::write(&config, other).unwrap();
    let message = reload::check(&mut run, &path).unwrap_err().to_string();
    assert!(message.contains("other logits") && message.contains("adapter"), "{message}");
    // The trained adapter acts again.
    std::fs::write(&config, text).unwrap();
    assert_eq!(reload::check(&mut run, &path).unwrap(), before);
    assert_eq!(run.adapters.names().collect::<Vec<_>>(), ["default"]);
}

#[test]
fn scores_that_are_no_numbers_do_not_pass_the_check_of_a_merge() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let (mut run, _) = common::train(Recipe {
        model: family("llama1"),
        max_steps: Some(3),
        ..recipe(&rows, &dir.path().join("unused"))
    });
    let path = dir.path().join("adapter");
    run.save_adapter(&path).unwrap();
    // A head that has no number for the last token: no score but every row's last one is NaN.
    let base = dir.path().join("base");
    changed_base("llama1", &base, "lm_head.weight", |t| poisoned(t, t.dims()[0] - 1));
    let mut model = Model::load(&base, &LoadOptions::cpu()).unwrap();
    let device = model.device().clone();
    let attached = folder::load(&mut model, folder::read(&path).unwrap(), true, DType::F32, &device).unwrap();
    let mut adapters = AdapterSet::new();
    adapters.add("a", attached).unwrap();
    adapters.activate(&mut model, &[("a", 1.0)]).unwrap();
    let probe = Probe::made(&model, &TextCodec::ids_only(model.config().vocab), &adapters).unwrap();
    let (out, options) = (dir.path().join("merged"), merge::WriteOptions::new(&model));
    let merged = merge::merge_into_folder(&mut model, &mut adapters, &out, &options, &probe);
    let message = merged.unwrap_err().to_string();
    assert!(message.contains("differ by inf"), "{message}");
}
