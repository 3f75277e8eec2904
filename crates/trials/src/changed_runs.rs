//! a run goes on only as what it was.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use espalier_adapters::MethodConfig;
use espalier_adapters::formats::folder;
use espalier_train::identity::{self, Identity};
use espalier_train::recipe::{KEYS, Key};
use espalier_train::{Error, Recipe, Silent, checkpoint};
use serde_json::Value;

use crate::{Scope, Tally, Trial, runs};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-22",
    title: "Resume under a change",
    claim: "A run is not resumed with another value of any recipe key or of any setting of its adapter, or with other bytes of \
            its data, tokenizer, model weights, model configuration or start adapter: the error names what differs and both \
            values, and no byte of the run folder is written. The keys that may differ, because nothing that is computed \
            depends on them, are declared in one list, and a run goes on with them. Every key there is takes part, in two \
            ways: with the value in the checkpoint changed, and with the value in the recipe changed where another one can \
            be told from its type or its documentation.",
    unit: "changes that were not refused, not named, or left a trace",
    bar: 0.0,
    bounded: 60,
    full: 200,
    run,
};

/// All files under a folder.
fn contents(folder: &Path) -> anyhow::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                all.insert(path.clone(), std::fs::read(&path)?);
            }
        }
    }
    Ok(all)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    for (path, bytes) in contents(from)? {
        let path = to.join(path.strip_prefix(from)?);
        std::fs::create_dir_all(path.parent().unwrap_or(to))?;
        std::fs::write(path, bytes)?;
    }
    Ok(())
}

/// A run that came to its end, in a folder of its own with everything it was made of.
struct Subject {
    name: &'static str,
    recipe: Recipe,
}

impl Subject {
    fn out(&self) -> &Path {
        Path::new(&self.recipe.out)
    }

    /// Tries to go on as `recipe`; what does not hold, if something: a refusal that says `named` and writes nothing is wanted.
    fn refuses(&self, recipe: &Recipe, named: &str) -> anyhow::Result<Option<String>> {
        let before = contents(self.out())?;
        let found = match runs::session(recipe, true, &mut Silent) {
            Ok(_) => Some("it went on".to_owned()),
            Err(Error::Changed { changes, .. }) => {
                let line = changes.iter().any(|line| line.contains(named) && line.contains(" now "));
                (!line).then(|| format!("refused for something else: {changes:?}"))
            }
            // What cannot be prepared at all is refused earlier, by its own error.
            Err(e) => (!e.to_string().contains(named)).then(|| format!("the error does not name it: {e}")),
        };
        Ok(match contents(self.out())? == before {
            true => found,
            false => Some(format!("{}something was written", found.map_or(String::new(), |f| f + "; "))),
        })
    }

    /// Tries to go on as `recipe` in a copy of the folder, which must do.
    fn goes_on(&self, recipe: &Recipe, scratch: &Path) -> anyhow::Result<Option<String>> {
        let out = scratch.join("copy");
        copy(self.out(), &out)?;
        let went = runs::session(&Recipe { out: out.display().to_string(), ..recipe.clone() }, true, &mut Silent);
        std::fs::remove_dir_all(&out)?;
        Ok(went.err().map(|e| format!("refused, although it is declared free: {e}")))
    }

    fn tally(&self, tally: &mut Tally, kind: &str, what: &str, found: Option<String>) {
        tally.count(kind);
        let held = found.is_none();
        tally.held(format!("{}, {what}: {}", self.name, found.unwrap_or_default()), held);
    }
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    for (i, name) in ["next tokens", "classes"].into_iter().enumerate() {
        let place = scope.scratch.join(format!("subject-{i}"));
        std::fs::create_dir_all(&place)?;
        let subject = made(&place, name)?;
        let still_goes_on = subject.goes_on(&subject.recipe, &place)?;
        subject.tally(tally, "unchanged", "nothing changed", still_goes_on);
        // The bounded form takes one subject for each.
        if scope.is_full() || i == 0 {
            recorded(&subject, &place, tally)?;
        }
        if scope.is_full() || i == 1 {
            given(&subject, &place, tally)?;
            files(&subject, tally)?;
        }
    }
    let place = scope.scratch.join("started");
    std::fs::create_dir_all(&place)?;
    started(&place, tally)?;
    if scope.is_full() {
        adapters(scope, tally)?;
    }
    Ok(())
}

/// A whole run of the recipe called `name` with files of its own in `place`.
fn made(place: &Path, name: &'static str) -> anyhow::Result<Subject> {
    let recipe = runs::saving(place, false)?.into_iter().find(|(n, _)| n == name).context("no such recipe")?.1;
    let model = place.join("model");
    copy(Path::new(&recipe.model), &model)?;
    let recipe = Recipe {
        model: model.display().to_string(),
        validation_split: 3.0,
        max_steps: Some(3),
        out: place.join("run").display().to_string(),
        ..recipe
    };
    runs::session(&recipe, false, &mut Silent)?;
    Ok(Subject { name, recipe })
}

/// Every key of the recipe that the checkpoint records, with another value there.
fn recorded(subject: &Subject, place: &Path, tally: &mut Tally) -> anyhow::Result<()> {
    let (_, newest) = checkpoint::list(&subject.out().join("checkpoints")).pop().context("no checkpoint")?;
    let file = newest.join("state.json");
    let whole = std::fs::read(&file)?;
    let state = checkpoint::read_state(&newest)?;
    let mut keys: BTreeSet<String> = KEYS.iter().map(|key| key.name.to_owned()).collect();
    keys.extend(state.identity.recipe.keys().cloned());
    for key in keys.iter().filter(|key| !identity::is_resolved(key)) {
        let mut changed = state.clone();
        let old = changed.identity.recipe.get(key).cloned().unwrap_or_default();
        changed.identity.recipe.insert(key.clone(), format!("{old} before"));
        std::fs::write(&file, serde_json::to_vec(&changed)?)?;
        let found = match identity::why_free(key) {
            Some(_) => subject.goes_on(&subject.recipe, place)?,
            None => subject.refuses(&subject.recipe, key)?,
        };
        std::fs::write(&file, &whole)?;
        let kind = if identity::why_free(key).is_some() { "key declared free" } else { "key changed in the checkpoint" };
        subject.tally(tally, kind, key, found);
    }
    // Everything beside the recipe that the checkpoint says it was made of.
    let known = serde_json::to_value(&state.identity)?;
    for key in known.as_object().into_iter().flat_map(|map| map.keys()).filter(|key| *key != "recipe") {
        let mut changed = serde_json::to_value(&state)?;
        let mut other = known[key].clone();
        let named = spoil(&mut other, key);
        changed["identity"][key] = other;
        let parsed: Identity = serde_json::from_value(changed["identity"].clone())?;
        ensure!(parsed != state.identity, "{key}: nothing was changed");
        std::fs::write(&file, serde_json::to_vec(&changed)?)?;
        let found = subject.refuses(&subject.recipe, &named)?;
        std::fs::write(&file, &whole)?;
        subject.tally(tally, "part of the run changed in the checkpoint", key, found);
    }
    Ok(())
}

/// Changes the first text in a value of a checkpoint; gives the word by which the change must be named.
fn spoil(value: &mut Value, key: &str) -> String {
    match value {
        Value::String(text) => {
            text.push('0');
            if key == "base" { "base model".to_owned() } else { key.to_owned() }
        }
        Value::Object(map) => match map.get_mut("dtype") {
            Some(Value::String(text)) => {
                text.push('0');
                "dtype".to_owned()
            }
            _ => map.iter_mut().next().map_or_else(String::new, |(k, v)| {
                *v = Value::String("\"other\"".into());
                k.clone()
            }),
        },
        other => {
            *other = Value::String("other".into());
            key.to_owned()
        }
    }
}

/// Other values of a recipe key, as its type and its documentation have them.
fn others(recipe: &toml::Table, key: &Key, place: &Path) -> Vec<toml::Value> {
    let words = || {
        let text = key.text();
        let list = text.rsplit_once(": ").map_or("", |(_, list)| list).trim_end_matches('.').to_owned();
        list.split(", ").filter_map(|w| w.split(' ').next().map(str::to_owned)).collect::<Vec<_>>()
    };
    match recipe.get(key.name) {
        Some(toml::Value::Integer(n)) => vec![(n + 1).into()],
        Some(toml::Value::Float(x)) => vec![if *x == 0.0 { 0.25 } else { x / 2.0 }.into()],
        Some(toml::Value::Boolean(b)) => vec![(!b).into()],
        Some(toml::Value::String(s)) => words().into_iter().filter(|w| w != s).map(Into::into).collect(),
        None if key.kind == "Option<usize>" => vec![2.into()],
        None if key.kind == "Option<String>" => vec![place.join("other").display().to_string().into()],
        _ => Vec::new(),
    }
}

/// Every key of the recipe, with another value in the recipe.
fn given(subject: &Subject, place: &Path, tally: &mut Tally) -> anyhow::Result<()> {
    let table = toml::Table::try_from(&subject.recipe)?;
    for key in KEYS.iter().filter(|key| key.name != "out") {
        for other in others(&table, key, place) {
            let mut changed = table.clone();
            changed.insert(key.name.into(), other.clone());
            let Ok(recipe) = Recipe::parse(&changed.to_string(), "changed") else { continue };
            if runs::prepared(&recipe).and_then(|(mut run, _)| run.plan(0)).is_err() {
                // A word of the documentation that is no value, or nothing that this machine or model has.
                tally.count("value of which no run can be made");
                continue;
            }
            let what = format!("{} = {other}", key.name);
            match identity::why_free(key.name) {
                Some(_) => subject.tally(tally, "key declared free", &what, subject.goes_on(&recipe, place)?),
                None if identity::is_resolved(key.name) && resolves_alike(subject, &recipe)? => {
                    subject.tally(tally, "another word for the same", &what, subject.goes_on(&recipe, place)?);
                }
                None => subject.tally(tally, "key changed in the recipe", &what, subject.refuses(&recipe, key.name)?),
            }
        }
    }
    Ok(())
}

/// Whether a recipe stands for the same as the subject's, as far as that is compared in place of its words.
fn resolves_alike(subject: &Subject, recipe: &Recipe) -> anyhow::Result<bool> {
    let resolved = |recipe: &Recipe| -> anyhow::Result<_> {
        let identity = runs::prepared(recipe)?.0.identity()?;
        Ok((identity.machine, identity.init_adapter))
    };
    Ok(resolved(recipe)? == resolved(&subject.recipe)?)
}

/// Files that the run was made of, with other bytes.
fn files(subject: &Subject, tally: &mut Tally) -> anyhow::Result<()> {
    let model = Path::new(&subject.recipe.model);
    let data = PathBuf::from(&subject.recipe.data.0.first().context("no data")?.path);
    let mut try_with = |file: &Path, bytes: Vec<u8>, what: &str, named: &str| -> anyhow::Result<()> {
        let whole = std::fs::read(file)?;
        ensure!(bytes != whole, "{what}: nothing was changed");
        std::fs::write(file, bytes)?;
        let found = subject.refuses(&subject.recipe, named)?;
        std::fs::write(file, whole)?;
        subject.tally(tally, "file changed", what, found);
        Ok(())
    };
    let weights = model.join("model.safetensors");
    let bytes = std::fs::read(&weights)?;
    for share in [1, 2, 3] {
        // The lowest bit of a value: the smallest change there is.
        let mut changed = bytes.clone();
        let at = (bytes.len() - 4 * share * 37) & !3;
        changed[at] ^= 1;
        try_with(&weights, changed, "one bit of the weights", "base model")?;
    }
    let text = std::fs::read_to_string(&data)?;
    let mut lines: Vec<&str> = text.lines().collect();
    lines.swap(0, 1);
    try_with(&data, (lines.join("\n") + "\n").into_bytes(), "order of the data", "data")?;
    lines.pop();
    try_with(&data, (lines.join("\n") + "\n").into_bytes(), "a row less", "data")?;
    if let Some(folder) = &subject.recipe.tokenizer {
        let file = Path::new(folder).join("tokenizer.json");
        let text = std::fs::read_to_string(&file)?;
        let other = text.replace("\"w1\":1,", "\"w1\":2,").replace("\"w2\":2,", "\"w2\":1,");
        try_with(&file, other.into_bytes(), "two tokens exchanged", "data")?;
    }
    let file = model.join("config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    for (key, value) in config.as_object().into_iter().flatten() {
        if identity::without_meaning(key) {
            continue;
        }
        let other = match value {
            Value::Number(n) if n.is_f64() => (n.as_f64().unwrap_or(0.0) * 2.0 + 0.001).into(),
            Value::Number(n) => (n.as_u64().unwrap_or(0) + 1).into(),
            Value::Bool(b) => (!b).into(),
            _ => continue,
        };
        let mut changed = config.clone();
        changed[key] = other;
        // A shape that the weights do not have is refused by the loader, which names tensor and shapes.
        let bytes = serde_json::to_vec(&changed)?;
        let named = match load_error(&file, &bytes)? {
            Some(_) => "",
            None => key.as_str(),
        };
        try_with(&file, bytes, &format!("config.json, {key}"), named)?;
    }
    Ok(())
}

/// Why a model with that `config.json` cannot be loaded at all.
fn load_error(file: &Path, bytes: &[u8]) -> anyhow::Result<Option<String>> {
    let whole = std::fs::read(file)?;
    std::fs::write(file, bytes)?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let loaded = espalier_models::Model::load(folder, &espalier_models::LoadOptions::cpu());
    std::fs::write(file, whole)?;
    Ok(loaded.err().map(|e| e.to_string()))
}

/// A run that started from a saved adapter, whose bytes change.
fn started(place: &Path, tally: &mut Tally) -> anyhow::Result<()> {
    let first = made(place, "next tokens")?;
    let start = place.join("start");
    copy(&first.out().join("adapter"), &start)?;
    let recipe = Recipe {
        init_adapter: Some(start.display().to_string()),
        adapter: toml::Table::new(),
        out: place.join("second").display().to_string(),
        ..first.recipe.clone()
    };
    runs::session(&recipe, false, &mut Silent)?;
    let subject = Subject { name: "from a saved adapter", recipe };
    let file = start.join(folder::WEIGHTS_FILE);
    let whole = std::fs::read(&file)?;
    let mut changed = whole.clone();
    let at = (changed.len() - 40) & !3;
    changed[at] ^= 1;
    std::fs::write(&file, changed)?;
    subject.tally(tally, "file changed", "one bit of the start", subject.refuses(&subject.recipe, "init_adapter")?);
    std::fs::write(&file, whole)?;
    let file = start.join(folder::CONFIG_FILE);
    let whole = std::fs::read_to_string(&file)?;
    let mut config: Value = serde_json::from_str(&whole)?;
    config["lora_alpha"] = 5.into();
    std::fs::write(&file, config.to_string())?;
    subject.tally(tally, "file changed", "settings of the start", subject.refuses(&subject.recipe, "init_adapter")?);
    std::fs::write(&file, whole)?;
    let moved = place.join("moved");
    copy(&start, &moved)?;
    let recipe = Recipe { init_adapter: Some(moved.display().to_string()), ..subject.recipe.clone() };
    subject.tally(tally, "the same start elsewhere", "its path", subject.goes_on(&recipe, place)?);
    let recipe = Recipe { init_adapter: None, adapter: first.recipe.adapter.clone(), ..subject.recipe.clone() };
    subject.tally(tally, "file changed", "no start", subject.refuses(&recipe, "init_adapter")?);
    Ok(())
}

/// Every example of a method resumed as every other one.
fn adapters(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let place = scope.scratch.join("methods");
    std::fs::create_dir_all(&place)?;
    let examples = MethodConfig::examples();
    for (i, (name, method)) in examples.iter().enumerate() {
        let mut subject = made_with(&place, i, runs::table(method)?)?;
        subject.name = "a method";
        for step in [1, 3, 7] {
            let (other_name, other) = &examples[(i + step) % examples.len()];
            if other == method {
                continue;
            }
            let recipe = Recipe { adapter: runs::table(other)?, ..subject.recipe.clone() };
            let found = subject.refuses(&recipe, "adapter")?;
            subject.tally(tally, "adapter changed", &format!("{name} as {other_name}"), found);
        }
    }
    Ok(())
}

fn made_with(place: &Path, i: usize, adapter: toml::Table) -> anyhow::Result<Subject> {
    let recipe = runs::saving(place, false)?.into_iter().next().context("no recipe")?.1;
    let out = place.join(format!("run-{i}")).display().to_string();
    let recipe = Recipe { max_steps: Some(2), adapter, out, ..recipe };
    runs::session(&recipe, false, &mut Silent)?;
    Ok(Subject { name: "next tokens", recipe })
}
