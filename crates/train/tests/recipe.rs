//! Recipes: errors that name the line and the nearest key, settings from the command line, round trips, and no panic on
//! any text.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use espalier_train::Recipe;
use espalier_train::recipe::{KEYS, Key, Setting, adapter_keys};
use proptest::prelude::*;

fn error(text: &str) -> String {
    Recipe::parse(text, "run.toml").unwrap_err().to_string()
}

fn with(settings: &[(&str, &str)]) -> espalier_train::Result<Recipe> {
    let settings: Vec<Setting> =
        settings.iter().map(|(key, text)| Setting { key: (*key).into(), text: (*text).into() }).collect();
    Recipe::read(None, &settings)
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_key() {
    let message = error("model = \"m\"\n\nbatchsize = 3\n");
    assert!(message.starts_with("run.toml:3:"), "{message}");
    assert!(message.contains("`batchsize`") && message.contains("`batch_size`"), "{message}");
    let message = error("lr = 1e-3\nr = 8\n");
    assert!(message.starts_with("run.toml:2:") && message.contains("[adapter]"), "{message}");
    let message = error("lr = 1e-3\n[adapter]\nmethod = \"lora\"\nalhpa = 3\n");
    assert!(message.starts_with("run.toml:4:") && message.contains("`alpha`"), "{message}");
}

#[test]
fn a_wrong_type_names_its_line() {
    for (text, line) in [
        ("model = \"m\"\nlr = \"fast\"\n", 2),
        ("batch_size = -1\n", 1),
        ("\n\nshuffle = 3\n", 3),
        ("seed = 1\nmax_steps = 1.5\n", 2),
        ("seed = 1\ndata = 3\n", 2),
        ("model = \"m\"\nmodel = \"n\"\n", 2),
        ("lr = = 3\n", 1),
    ] {
        let message = error(text);
        assert!(message.starts_with(&format!("run.toml:{line}")), "{text:?}: {message}");
    }
}

#[test]
fn a_wrong_value_names_its_line() {
    for (text, line, word) in [
        ("seed = 1\nschedule = \"cosin\"\n", 2, "cosine"),
        ("dtype = \"fp32\"\n", 1, "f32"),
        ("batch_size = 0\n", 1, "at least 1"),
        ("lr = 1e-3\nbeta1 = 1.0\n", 2, "below 1"),
        ("lr = nan\n", 1, "NaN"),
        ("seed = 3\nlr = -1.0\n", 2, "-1"),
        ("quantization = \"int4\"\n", 1, "int8"),
        ("optimizer = \"adam\"\n", 1, "adamw"),
        ("[dynamics]\nmethod = \"lisaa\"\n", 2, "lisa"),
        ("[dynamics]\nmethod = \"lisa\"\nintervall = 3\n", 3, "interval"),
        ("[dynamics]\nmethod = \"lisa\"\nratio = 3\n", 3, "no setting of `lisa`"),
        ("[adapter]\nr = 8\nmethod = \"lorra\"\n", 3, "lora"),
        ("[adapter]\nr = 8\nalpha = \"many\"\n", 3, "many"),
        ("[adapter]\nr = 8\ntarget_modules = 5\n", 3, "target_modules"),
        ("[adapter]\nr = \"eight\"\nalpha = 8\n", 2, "eight"),
        ("[adapter]\nr = 8\nbias = \"some\"\n", 3, "some"),
    ] {
        let message = error(text);
        assert!(message.starts_with(&format!("run.toml:{line}:")), "{text:?}: {message}");
        assert!(message.contains(word), "{text:?}: {message}");
    }
}

#[test]
fn settings_are_typed_as_their_keys_want_them() {
    let recipe = with(&[
        ("lr", "2e-3"),
        ("batch_size", "4"),
        ("shuffle", "false"),
        ("model", "123"),
        ("out", "runs/a b#c"),
        ("data", "[\"a.jsonl\", \"b.jsonl\"]"),
        ("tags", "7"),
        ("adapter.method", "dora"),
        ("adapter.r", "3"),
        ("adapter.alpha", "6"),
        ("adapter.target_modules", "[\"q_proj\"]"),
    ])
    .unwrap();
    assert_eq!((recipe.lr, recipe.batch_size, recipe.shuffle), (2e-3, 4, false));
    assert_eq!((recipe.model.as_str(), recipe.out.as_str()), ("123", "runs/a b#c"));
    assert_eq!(recipe.data.0.iter().map(|d| d.path.as_str()).collect::<Vec<_>>(), ["a.jsonl", "b.jsonl"]);
    assert_eq!(recipe.tags.0, ["7"]);
    let config = recipe.adapter_config().unwrap();
    assert_eq!(config.method.name(), "dora");
    assert_eq!(config.method.rank_and_alpha(), (3, 6.0));
    // A later setting wins; a whole number serves where a float is wanted.
    assert_eq!(with(&[("lr", "1"), ("lr", "2")]).unwrap().lr, 2.0);
    let mixture = with(&[("data", "[{ path = \"a\", weight = 2.0 }, { path = \"b\", weight = 1 }]")]).unwrap();
    assert_eq!(mixture.data.0.iter().map(|d| d.weight).collect::<Vec<_>>(), [Some(2.0), Some(1.0)]);
}

#[test]
fn wrong_settings_are_refused_with_the_nearest_key() {
    for (key, text, words) in [
        ("learning_rat", "1", vec!["learning_rat"]),
        ("batch_sise", "1", vec!["`batch_size`"]),
        ("lr", "fast", vec!["fast"]),
        ("data.path", "x", vec!["data.path", "adapter."]),
        ("adapter.rang", "3", vec!["`rang`"]),
        ("adapter.r", "-3", vec!["adapter.r"]),
        ("adapter", "3", vec!["table"]),
    ] {
        let message = with(&[(key, text)]).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{key}={text}: {message}");
        }
    }
}

#[test]
fn settings_go_over_a_file_and_its_errors_name_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.toml");
    std::fs::write(&file, "lr = 1e-3\nseed = 5\n[adapter]\nr = 2\n").unwrap();
    let settings = [Setting { key: "lr".into(), text: "3e-3".into() }];
    let recipe = Recipe::read(Some(&file), &settings).unwrap();
    assert_eq!((recipe.lr, recipe.seed), (3e-3, 5));
    assert_eq!(recipe.adapter_config().unwrap().method.rank_and_alpha().0, 2);
    std::fs::write(&file, "lr = 1e-3\nsed = 5\n").unwrap();
    let message = Recipe::read(Some(&file), &[]).unwrap_err().to_string();
    assert!(message.contains("r.toml:2") && message.contains("`seed`"), "{message}");
    let message = Recipe::read(Some(&dir.path().join("none.toml")), &[]).unwrap_err().to_string();
    assert!(message.contains("none.toml"), "{message}");
}

/// A value of a key other than its default.
fn other_value(key: &Key) -> String {
    let chosen = match key.name {
        "dtype" => "bf16",
        "quantization" => "nf4",
        "schedule" => "wsd",
        "truncation" => "drop",
        "text_unit" => "file",
        "optimizer" => "adamw",
        "muon_adjust_lr" => "match_rms_adamw",
        _ => match key.kind {
            "bool" => return (!key.default.parse::<bool>().unwrap()).to_string(),
            "u64" | "usize" | "Option<usize>" => "37",
            "f64" | "Option<f64>" => "0.375",
            "String" | "Option<String>" | "DataList" | "OneOrMany" => "some text \"quoted\"",
            other => panic!("{}: no value for kind {other}", key.name),
        },
    };
    chosen.to_owned()
}

#[test]
fn every_key_survives_being_written_and_read() {
    let default = Recipe::default();
    assert_eq!(Recipe::parse(&default.to_toml().unwrap(), "default").unwrap(), default);
    for key in KEYS {
        // Settings of other optimisers are refused.
        let muons = ["momentum", "nesterov", "muon_adjust_lr"].contains(&key.name);
        let optimizer = if muons { ("optimizer", "muon") } else { ("seed", "0") };
        let recipe = with(&[optimizer, (key.name, &other_value(key))]).unwrap_or_else(|e| panic!("{}: {e}", key.name));
        if key.name != "optimizer" {
            assert_ne!(recipe, default, "{}", key.name);
        }
        let text = recipe.to_toml().unwrap();
        assert_eq!(Recipe::parse(&text, key.name).unwrap(), recipe, "{text}");
        assert!(!key.text().is_empty(), "{} has no documentation", key.name);
    }
    let names: Vec<String> = adapter_keys().into_iter().map(|k| k.name).collect();
    assert!(KEYS.iter().all(|k| !names.contains(&k.name.to_owned())), "a key is in both tables");
    let mut sorted = names.clone();
    sorted.sort();
    sorted.dedup();
    assert_eq!(sorted.len(), names.len(), "an adapter key is there twice");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,120}") {
        let _ = Recipe::parse(&text, "text");
    }

    #[test]
    fn no_lines_of_keys_make_it_panic(
        lines in prop::collection::vec((0..KEYS.len(), "[a-z0-9\"'\\[\\]{}=.,\\-# ]{0,12}"), 0..6),
        adapter in prop::collection::vec((0..adapter_keys().len(), "[a-z0-9\"'\\[\\]{}=.,\\-# ]{0,12}"), 0..4),
    ) {
        let names = adapter_keys();
        let mut text: String = lines.iter().map(|(i, value)| format!("{} = {value}\n", KEYS[*i].name)).collect();
        text.push_str("[adapter]\n");
        text.extend(adapter.iter().map(|(i, value)| format!("{} = {value}\n", names[*i].name)));
        if let Ok(recipe) = Recipe::parse(&text, "lines") {
            prop_assert_eq!(Recipe::parse(&recipe.to_toml().unwrap(), "again").unwrap(), recipe);
        }
    }

    #[test]
    fn no_setting_makes_it_panic(key in "[a-z_.]{0,12}", named in 0..KEYS.len(), value in "\\PC{0,24}") {
        let _ = with(&[(&key, &value)]);
        let _ = with(&[(KEYS[named].name, &value)]);
        let _ = with(&[(&format!("adapter.{key}"), &value)]);
    }
}
