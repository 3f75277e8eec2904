//! The `[adapter]` table: the method's own settings beside those of placement.

use espalier_adapters::AdapterConfig;
use espalier_adapters::config::unknown_value;
use espalier_adapters::parametrisation::{METHODS, MethodConfig};
use espalier_adapters::target::TargetSpec;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::{Error, Result};

/// A key of the `[adapter]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterKey {
    /// Name in the table.
    pub name: String,
    /// What it does, or which methods have it.
    pub doc: String,
}

/// Keys of placement, which every method has.
pub const ADAPTER_KEYS: &[(&str, &str)] = &[
    ("method", "Method of the adapter."),
    (
        "target_modules",
        "Modules to adapt: all-linear, all-norms, input-embedding, a list of path endings, or a regular expression on the whole path [default: what the method is for].",
    ),
    ("exclude_modules", "Modules to leave alone: a list of path endings, or a regular expression."),
    ("layers_to_transform", "Only these layers: an index or a list."),
    ("layers_pattern", "Name of the module list that the indices count."),
    ("rank_pattern", "Ranks of single modules: { ending or regular expression = rank }."),
    ("alpha_pattern", "Alphas of single modules: { ending or regular expression = alpha }."),
    ("bias", "Biases trained beside the adapter: none, all, lora_only."),
    ("modules_to_save", "Modules trained and saved whole beside the adapter: a list of path endings."),
    ("trainable_tokens", "Token rows trained beside the adapter: a list of ids, or { module = ids }."),
    ("tie_weights", "Whether a trained input embedding stays tied to the output head where the base ties them."),
];

fn method_fields(method: &MethodConfig) -> Result<Table> {
    match Value::try_from(method) {
        Ok(Value::Table(table)) => Ok(table),
        Ok(_) => Err(Error::recipe("adapter", "a method must be a table")),
        Err(e) => Err(Error::recipe("adapter", e.to_string())),
    }
}

/// The methods that have a field, by its default.
type ByDefault<'a> = Vec<(String, Vec<&'a str>)>;

/// All keys of the `[adapter]` table: placement, then the methods' own settings.
pub fn adapter_keys() -> Vec<AdapterKey> {
    let mut keys: Vec<AdapterKey> =
        ADAPTER_KEYS.iter().map(|(name, doc)| AdapterKey { name: (*name).into(), doc: (*doc).into() }).collect();
    let mut own: Vec<(String, ByDefault<'_>)> = Vec::new();
    for name in METHODS {
        let fields = MethodConfig::by_name(name).ok().and_then(|m| method_fields(&m).ok()).unwrap_or_default();
        for (field, default) in fields.into_iter().filter(|(field, _)| field != "method") {
            let default = default.to_string();
            let at = own.iter().position(|(known, _)| *known == field).unwrap_or_else(|| {
                own.push((field, Vec::new()));
                own.len() - 1
            });
            let defaults = &mut own[at].1;
            match defaults.iter_mut().find(|(known, _)| *known == default) {
                Some((_, methods)) => methods.push(name),
                None => defaults.push((default, vec![name])),
            }
        }
    }
    keys.extend(own.into_iter().map(|(name, defaults)| {
        let parts = defaults.iter().map(|(default, methods)| format!("{} [default: {default}]", methods.join(", ")));
        AdapterKey { doc: format!("Setting of {}.", parts.collect::<Vec<_>>().join(", ")), name }
    }));
    keys
}

fn take<T: DeserializeOwned>(table: &mut Table, key: &str) -> Result<Option<T>> {
    table
        .remove(key)
        .map(|v| {
            v.clone().try_into().map_err(|e: toml::de::Error| {
                Error::recipe(format!("adapter.{key}"), format!("{v} is not valid: {}", e.message()))
            })
        })
        .transpose()
}

/// Reads `fields`; an error names the field that does not go with the valid `defaults`.
fn read<T: DeserializeOwned>(defaults: &Table, fields: Table) -> Result<T> {
    let parse = |table: Table| Value::Table(table).try_into::<T>();
    parse(fields.clone()).map_err(|whole| {
        for (key, value) in fields {
            let mut one = defaults.clone();
            one.insert(key.clone(), value.clone());
            if let Err(e) = parse(one) {
                return Error::recipe(format!("adapter.{key}"), format!("{value} is not valid: {}", e.message()));
            }
        }
        Error::recipe("adapter", whole.message().to_owned())
    })
}

/// Reads the table.
pub(super) fn parse(table: &Table) -> Result<AdapterConfig> {
    let mut table = table.clone();
    let name: String = take(&mut table, "method")?.unwrap_or_else(|| "lora".into());
    let default = MethodConfig::by_name(&name).map_err(|e| match e {
        espalier_adapters::Error::Config { message, .. } => Error::recipe("adapter.method", message),
        other => other.into(),
    })?;
    let defaults = method_fields(&default)?;
    let mut fields = defaults.clone();
    let own: Vec<String> = fields.keys().filter(|k| *k != "method").cloned().collect();
    for key in own {
        if let Some(value) = table.remove(&key) {
            // A whole number serves where a float is wanted.
            let value = match (&fields[&key], value) {
                (Value::Float(_), Value::Integer(n)) => Value::Float(n as f64),
                (_, value) => value,
            };
            fields.insert(key, value);
        }
    }
    let method: MethodConfig = read(&defaults, fields)?;
    let mut targets = Table::new();
    for key in
        ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"]
    {
        if let Some(value) = table.remove(key) {
            targets.insert(key.into(), value);
        }
    }
    let named = targets.contains_key("target_modules");
    let read: TargetSpec = read(&Table::new(), targets)?;
    let default = AdapterConfig::new(method);
    let target_modules = if named { read.target_modules } else { default.targets.target_modules.clone() };
    let config = AdapterConfig {
        targets: TargetSpec { target_modules, ..read },
        bias: take(&mut table, "bias")?.unwrap_or_default(),
        modules_to_save: take(&mut table, "modules_to_save")?.unwrap_or_default(),
        trainable_tokens: take(&mut table, "trainable_tokens")?,
        tie_weights: take(&mut table, "tie_weights")?.unwrap_or(true),
        ..default
    };
    if let Some(key) = table.keys().next() {
        let names: Vec<String> = adapter_keys().into_iter().map(|k| k.name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let message = if names.contains(&key.as_str()) {
            format!("`{key}` is no setting of method `{name}`")
        } else {
            unknown_value(key, &names)
        };
        return Err(Error::recipe(format!("adapter.{key}"), message));
    }
    Ok(config)
}
