//! Recipes: TOML files that say everything about a run, with errors that name the line and the nearest valid key.

mod adapter;
mod dynamics;
pub mod keys;
mod table;
pub mod values;

use std::path::Path;

pub use adapter::{ADAPTER_KEYS, adapter_keys};
pub use dynamics::dynamics_keys;
use espalier_adapters::AdapterConfig;
pub use keys::{KEYS, Key, Recipe};
pub use table::TableKey;
use toml::{Table, Value};

use crate::dynamics::DynamicsConfig;
use crate::{Error, Result};

/// A setting from the command line: a dotted key and its value as typed.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// `lr`, or `adapter.r`.
    pub key: String,
    /// The value as typed.
    pub text: String,
}

impl Recipe {
    /// Reads a recipe file, if there is one, with `settings` over it.
    ///
    /// # Errors
    /// If the file cannot be read, a key is unknown, or a value is not valid.
    pub fn read(file: Option<&Path>, settings: &[Setting]) -> Result<Self> {
        let mut table = match file {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
                Self::parse(&text, &path.display().to_string())?;
                text.parse::<Table>().map_err(|e| Error::recipe(path.display().to_string(), e.to_string()))?
            }
            None => Table::new(),
        };
        for setting in settings {
            set(&mut table, setting)?;
        }
        let recipe: Self = Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| Error::recipe("recipe", describe(e.message())))?;
        recipe.check()?;
        Ok(recipe)
    }

    /// Parses a recipe's text; `name` is used in messages.
    ///
    /// # Errors
    /// If it is not TOML, a key is unknown, or a value has the wrong type.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map(|s| 1 + text[..s.start.min(text.len())].matches('\n').count());
            let place = line.map_or_else(|| name.to_owned(), |line| format!("{name}:{line}"));
            Error::recipe(place, describe(e.message()))
        })?;
        if let Err(Error::Recipe { place, message }) = recipe.check() {
            let line = text.lines().position(|l| key_of_line(l).is_some_and(|k| place.ends_with(k)));
            let place = line.map_or_else(|| format!("{name}: {place}"), |i| format!("{name}:{}: {place}", i + 1));
            return Err(Error::Recipe { place, message });
        }
        Ok(recipe)
    }

    /// The adapter, unless the run starts from a saved one.
    ///
    /// # Errors
    /// If a key of `[adapter]` is unknown or has a wrong value.
    pub fn adapter_config(&self) -> Result<AdapterConfig> {
        adapter::parse(&self.adapter)
    }

    /// How parameters move.
    ///
    /// # Errors
    /// If a key of `[dynamics]` is unknown or has a wrong value.
    pub fn dynamics_config(&self) -> Result<DynamicsConfig> {
        dynamics::parse(&self.dynamics)
    }

    /// The recipe as TOML, every key filled in.
    ///
    /// # Errors
    /// If a value has no place in TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::recipe("recipe", e.to_string()))
    }

    /// Checks values that types do not.
    fn check(&self) -> Result<()> {
        let wrong = |key: &str, message: String| Err(Error::recipe(key, message));
        let choice = |key: &str, value: &str, known: &[&str]| {
            if known.contains(&value) {
                Ok(())
            } else {
                wrong(key, espalier_adapters::config::unknown_value(value, known))
            }
        };
        choice("dtype", &self.dtype, &["auto", "f32", "bf16", "f16"])?;
        choice("quantization", &self.quantization, crate::setup::QUANTIZATIONS)?;
        choice("schedule", &self.schedule, &["constant", "linear", "cosine", "wsd"])?;
        crate::optimizer::rule(self)?;
        choice("truncation", &self.truncation, &["right", "drop"])?;
        choice("text_unit", &self.text_unit, &["line", "paragraph", "file"])?;
        for (key, value) in [("batch_size", self.batch_size), ("accumulation", self.accumulation)] {
            if value == 0 {
                return wrong(key, "must be at least 1".into());
            }
        }
        let shares = [
            ("warmup_ratio", self.warmup_ratio),
            ("min_lr_ratio", self.min_lr_ratio),
            ("decay_ratio", self.decay_ratio),
        ];
        if let Some((key, value)) = shares.into_iter().find(|(_, v)| !(0.0..=1.0).contains(v)) {
            return wrong(key, format!("{value} is not between 0 and 1"));
        }
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return wrong(key, format!("{value} is not at least 0 and below 1"));
            }
        }
        let positive = [
            ("lr", self.lr),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("validation_split", self.validation_split),
            ("epochs", self.epochs),
        ];
        if let Some((key, value)) = positive.into_iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return wrong(key, format!("{value} is not a number of at least 0"));
        }
        let weights = self.data.0.iter().chain(&self.eval_data.0).filter_map(|d| d.weight);
        if let Some(weight) = weights.into_iter().find(|w| !(w.is_finite() && *w > 0.0)) {
            return wrong("data", format!("weight {weight} is not above 0"));
        }
        self.dynamics_config()?;
        self.adapter_config().map(|_| ())
    }
}

/// Keys of a recipe that are tables.
const TABLES: [&str; 2] = ["adapter", "dynamics"];

fn key_of_line(line: &str) -> Option<&str> {
    let (key, _) = line.split_once('=')?;
    let key = key.trim();
    (!key.is_empty()).then_some(key)
}

/// A serde message, with the nearest valid key where one is unknown.
fn describe(message: &str) -> String {
    let Some(name) = message.strip_prefix("unknown field `").and_then(|m| m.split('`').next()) else {
        return message.to_owned();
    };
    if name == "lora_plus_ratio" {
        return "unknown key: `lora_plus_ratio` is now `ratio` of the dynamics `lora-plus`, in the [dynamics] table"
            .to_owned();
    }
    let known: Vec<&str> = KEYS.iter().map(|k| k.name).chain(TABLES).collect();
    let mut text = espalier_adapters::config::unknown_value(name, &known);
    if let Some(cut) = text.find(" (known:") {
        text.truncate(cut);
    }
    let tables = [("adapter", adapter_keys()), ("dynamics", dynamics_keys())];
    if let Some((table, _)) = tables.iter().find(|(_, keys)| keys.iter().any(|k| k.name == name)) {
        text = format!("`{name}` belongs into the [{table}] table");
    }
    format!("unknown key: {text}")
}

/// Puts one setting into a table, typed as its key wants it.
fn set(table: &mut Table, setting: &Setting) -> Result<()> {
    let text = setting.text.trim();
    let is_text = KEYS
        .iter()
        .any(|k| k.name == setting.key && ["String", "Option<String>", "DataList", "OneOrMany"].contains(&k.kind));
    let parsed = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    let value = match parsed {
        Some(value) if !is_text || value.is_array() || value.is_table() => value,
        Some(Value::String(inner)) => Value::String(inner),
        _ => Value::String(text.to_owned()),
    };
    let (head, tail) = match setting.key.split_once('.') {
        Some((table, tail)) if TABLES.contains(&table) => (table, Some(tail)),
        Some(_) => {
            return Err(Error::recipe(
                &setting.key,
                "no such key; only `adapter.` and `dynamics.` have keys of their own",
            ));
        }
        None => (setting.key.as_str(), None),
    };
    match tail {
        None if TABLES.contains(&head) && !value.is_table() => {
            return Err(Error::recipe(head, format!("{value} is not a table; set single keys as `{head}.KEY=VALUE`")));
        }
        None => {
            table.insert(head.to_owned(), value);
        }
        Some(tail) => {
            let inner = table.entry(head).or_insert_with(|| Value::Table(Table::new()));
            let inner = inner.as_table_mut().ok_or_else(|| Error::recipe(head, "must be a table"))?;
            inner.insert(tail.to_owned(), value);
        }
    }
    Ok(())
}
