//! Data and numbers that cannot be trained on: one clear error each, and earlier files whole.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use common::{Watcher, family, recipe, session, train, write_rows};
use espalier_train::{Error, Recipe, Run, checkpoint};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn recipe(&self, rows: &Path) -> Recipe {
        recipe(rows, &self.dir.path().join("run"))
    }

    fn refuses(&self, recipe: Recipe, words: &[&str]) {
        let message = Run::prepare(recipe).map(|_| ()).expect_err("nothing was refused").to_string();
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
        assert!(!self.dir.path().join("run").exists(), "a run folder was made");
    }
}

const GOOD: &str = "{\"input_ids\": [3, 4, 5, 6], \"labels\": [-100, 4, 5, 6]}\n";
const MASKED: &str = "{\"input_ids\": [3, 4, 5, 6], \"labels\": [-100, -100, -100, -100]}\n";

#[test]
fn empty_data_are_refused() {
    let place = Place::new();
    let empty = place.write("empty.jsonl", "");
    place.refuses(place.recipe(&empty), &["empty.jsonl"]);
    let blank = place.write("blank.jsonl", "\n\n  \n");
    place.refuses(place.recipe(&blank), &["blank.jsonl"]);
    place.refuses(place.recipe(&place.dir.path().join("none.jsonl")), &["none.jsonl"]);
    place.refuses(Recipe { data: Default::default(), ..place.recipe(&empty) }, &["data", "no training data"]);
}

#[test]
fn rows_without_a_trained_token_are_refused_and_counted() {
    let place = Place::new();
    let rows = place.write("rows.jsonl", &format!("{GOOD}{MASKED}{GOOD}{MASKED}"));
    let mut run = Run::prepare(place.recipe(&rows)).unwrap();
    let report = run.plan(0).unwrap().data[0].report.clone();
    assert_eq!((report.rows, report.used, report.refused.values().sum::<u64>()), (4, 2, 2), "{report:?}");
    assert!(report.first_errors[0].contains("rows.jsonl:2: no trained token"), "{report:?}");
    let all = place.write("all.jsonl", &MASKED.repeat(3));
    for skip_bad_rows in [false, true] {
        place.refuses(Recipe { skip_bad_rows, ..place.recipe(&all) }, &["all.jsonl"]);
    }
}

#[test]
fn a_conversation_without_a_template_says_where_one_can_be_given() {
    let place = Place::new();
    let rows = place.write(
        "chat.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
    );
    let from = espalier_models::seedling::folder().unwrap();
    let folder = place.dir.path().join("tokenizer");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(from.join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    let with = Recipe {
        model: from.display().to_string(),
        tokenizer: Some(folder.display().to_string()),
        max_length: 64,
        ..place.recipe(&rows)
    };
    place.refuses(
        with.clone(),
        &["chat.jsonl:1", "chat template", "put chat_template.jinja into the folder", "`tokenizer`"],
    );
    // The key it names exists, and what it says helps.
    assert!(toml::Table::try_from(&with).unwrap().contains_key("tokenizer"));
    let template =
        "{% for m in messages %}{{ m.content }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    // This one never says where a turn ends, and is refused for that unless it is wanted.
    place.refuses(with.clone(), &["chat.jsonl:1", "no stop token", "<|endoftext|>", "allow_no_stop"]);
    Run::prepare(Recipe { allow_no_stop: true, ..with.clone() }).unwrap();
    // A shipped template by its name, or a file; the run keeps the one it was trained by.
    let run = Run::prepare(Recipe { chat_template: Some("zephyr".into()), ..with.clone() }).unwrap();
    assert_eq!(run.codec.template().unwrap().source(), espalier_data::shipped("zephyr").unwrap());
    let file =
        place.write("mine.jinja", &template.replace("{% endgeneration %}", "{{ eos_token }}{% endgeneration %}"));
    Run::prepare(Recipe { chat_template: Some(file.display().to_string()), ..with.clone() }).unwrap();
    place.refuses(Recipe { chat_template: Some("zephir".into()), ..with }, &["\"zephir\"", "zephyr", "chatml"]);
}

#[test]
fn a_bad_row_names_file_and_line() {
    let place = Place::new();
    for (bad, word) in [
        ("{\"input_ids\": [3, 4", "EOF"),
        ("{\"input_ids\": [3, 64, 5], \"labels\": [3, 64, 5]}", "64"),
        ("{\"input_ids\": [3, 4, 5], \"labels\": [3, 4]}", "labels"),
        ("{\"input_ids\": [3, 4, 5], \"labels\": [3, 4, 99]}", "99"),
        ("{\"input_ids\": [3, -4, 5]}", "-4"),
        ("{\"inputs\": [3, 4, 5]}", "inputs"),
        ("[1, 2]", ""),
    ] {
        let rows = place.write("rows.jsonl", &format!("{GOOD}{bad}\n{GOOD}"));
        place.refuses(place.recipe(&rows), &["rows.jsonl:2", word]);
        let run = Run::prepare(Recipe { skip_bad_rows: true, ..place.recipe(&rows) }).unwrap();
        assert_eq!(run.data.reports[0].1.used, 2, "{bad}");
    }
}

#[test]
fn text_needs_a_tokenizer_that_fits_the_model() {
    let place = Place::new();
    let text = place.write("text.jsonl", "{\"text\": \"once upon a time\"}\n");
    place.refuses(place.recipe(&text), &["tokenizer"]);
    let seedling = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/assets/seedling");
    let tokenizer = Some(seedling.display().to_string());
    place.refuses(Recipe { tokenizer, ..place.recipe(&text) }, &["tokenizer", "2048", "64", "another model"]);
    let tokenizer = Some(place.dir.path().join("nowhere").display().to_string());
    place.refuses(Recipe { tokenizer, ..place.recipe(&text) }, &["nowhere"]);
}

#[test]
fn labels_and_heads_must_fit() {
    let place = Place::new();
    let classes = place.write("classes.jsonl", "{\"input_ids\": [3, 4, 5], \"label\": 7}\n");
    let classifier = Recipe { model: family("bert"), max_steps: Some(1), ..place.recipe(&classes) };
    let failed = Run::prepare(classifier)
        .and_then(|mut run| run.train(None, false, &mut Watcher::default(), &AtomicBool::new(false)));
    let message = failed.unwrap_err().to_string();
    assert!(message.contains('7'), "{message}");
}

#[test]
fn adapters_that_fit_nothing_are_refused() {
    let place = Place::new();
    let rows = place.write("rows.jsonl", GOOD);
    let mut adapter = common::lora(4, 0.0);
    adapter.insert("target_modules".into(), vec!["q_prj".to_owned()].into());
    place.refuses(Recipe { adapter, ..place.recipe(&rows) }, &["q_prj", "q_proj"]);
    let init_adapter = Some(common::golden().join("adapters/gpt2_lora").display().to_string());
    let other = Recipe { init_adapter, adapter: toml::Table::new(), ..place.recipe(&rows) };
    place.refuses(other.clone(), &["c_attn"]);
    place.refuses(Recipe { adapter: common::lora(4, 0.0), ..other }, &["init_adapter"]);
}

#[test]
fn a_loss_that_is_no_number_stops_with_the_last_checkpoint_whole() {
    let place = Place::new();
    let rows = place.dir.path().join("rows.jsonl");
    write_rows(&rows, 8);
    let recipe = Recipe { lr: 1e30, save_every: 1, max_grad_norm: 0.0, ..place.recipe(&rows) };
    let error = session(&recipe, false, None).unwrap_err();
    let Error::NotFinite { step, value, ref checkpoint, .. } = error else { panic!("{error}") };
    assert!(step >= 2 && !value.is_finite(), "{error}");
    assert!(error.hint().unwrap().contains("learning rate"));
    let checkpoints = checkpoint::list(&place.dir.path().join("run/checkpoints"));
    let (newest, path) = checkpoints.last().unwrap();
    assert_eq!((*newest, path.display().to_string()), (step - 1, checkpoint.clone()));
    assert_eq!(checkpoint::read_state(path).unwrap().step, step - 1);
    let finite = common::tensors(&path.join("parameters.safetensors"))
        .values()
        .all(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
    assert!(finite, "the last good checkpoint holds numbers that are not finite");
    assert!(!place.dir.path().join("run/adapter").exists(), "a result was written");
}

#[test]
fn no_training_at_all_leaves_the_adapter_as_it_was() {
    let place = Place::new();
    let rows = place.write("rows.jsonl", GOOD);
    let (run, seen) = train(Recipe { max_steps: Some(0), ..place.recipe(&rows) });
    assert!(seen.steps.is_empty());
    let fresh = Run::prepare(Recipe { max_steps: Some(0), ..place.recipe(&rows) }).unwrap();
    for (a, b) in run.parameters.trainable().zip(fresh.parameters.trainable()) {
        let values =
            |p: &espalier_adapters::parameter::Parameter| p.tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(a), values(b), "{}", a.name);
    }
}
