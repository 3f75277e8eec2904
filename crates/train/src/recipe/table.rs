//! Tables of a recipe that name one choice of an axis by `method` and hold its settings.

use espalier_adapters::config::unknown_value;
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::{Error, Result};

/// A key of such a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableKey {
    /// Name in the table.
    pub name: String,
    /// What it does, or which choices have it.
    pub doc: String,
}

/// The settings of a choice as a table; `table` is its name in messages.
pub(super) fn fields<T: Serialize>(table: &str, choice: &T) -> Result<Table> {
    match Value::try_from(choice) {
        Ok(Value::Table(fields)) => Ok(fields),
        Ok(_) => Err(Error::recipe(table, "settings must be a table")),
        Err(e) => Err(Error::recipe(table, e.to_string())),
    }
}

/// The settings of all choices by name, each with the choices that have it.
pub(super) fn keys_of<'a>(names: &[&'a str], fields: impl Fn(&'a str) -> Option<Table>) -> Vec<TableKey> {
    let mut own: Vec<(String, Vec<(&str, String)>)> = Vec::new();
    for name in names {
        for (field, default) in fields(name).unwrap_or_default().into_iter().filter(|(field, _)| field != "method") {
            let at = match own.iter().position(|(known, _)| *known == field) {
                Some(at) => at,
                None => {
                    own.push((field, Vec::new()));
                    own.len() - 1
                }
            };
            own[at].1.push((name, default.to_string()));
        }
    }
    own.into_iter().map(|(name, users)| TableKey { doc: doc_of(&users), name }).collect()
}

/// Which choices have a setting, and its default: once where they agree.
fn doc_of(users: &[(&str, String)]) -> String {
    let names: Vec<&str> = users.iter().map(|(name, _)| *name).collect();
    match users {
        [(_, first), rest @ ..] if rest.iter().all(|(_, d)| d == first) => {
            format!("Setting of {} [default: {first}].", names.join(", "))
        }
        _ => {
            let each: Vec<String> =
                users.iter().map(|(name, default)| format!("{name} [default: {default}]")).collect();
            format!("Setting of {}.", each.join(", "))
        }
    }
}

/// Takes one key out of a table.
pub(super) fn take<T: DeserializeOwned>(place: &str, table: &mut Table, key: &str) -> Result<Option<T>> {
    table
        .remove(key)
        .map(|v| {
            v.clone().try_into().map_err(|e: toml::de::Error| {
                Error::recipe(format!("{place}.{key}"), format!("{v} is not valid: {}", e.message()))
            })
        })
        .transpose()
}

/// Reads `fields`; an error names the field that does not go with the valid `defaults`.
pub(super) fn read<T: DeserializeOwned>(place: &str, defaults: &Table, fields: Table) -> Result<T> {
    let parse = |table: Table| Value::Table(table).try_into::<T>();
    parse(fields.clone()).map_err(|whole| {
        for (key, value) in fields {
            let mut one = defaults.clone();
            one.insert(key.clone(), value.clone());
            if let Err(e) = parse(one) {
                return Error::recipe(format!("{place}.{key}"), format!("{value} is not valid: {}", e.message()));
            }
        }
        Error::recipe(place, whole.message().to_owned())
    })
}

/// Takes the settings of a choice out of a table, over those of `default`.
pub(super) fn settings<T: Serialize + DeserializeOwned>(place: &str, table: &mut Table, default: &T) -> Result<T> {
    let defaults = fields(place, default)?;
    let mut all = defaults.clone();
    let own: Vec<String> = all.keys().filter(|k| *k != "method").cloned().collect();
    for key in own {
        if let Some(value) = table.remove(&key) {
            // A whole number serves where a float is wanted.
            let value = match (&all[&key], value) {
                (Value::Float(_), Value::Integer(n)) => Value::Float(n as f64),
                (_, value) => value,
            };
            all.insert(key, value);
        }
    }
    read(place, &defaults, all)
}

/// Refuses the first key that nothing took, naming the nearest of `known`.
pub(super) fn nothing_left(
    place: &str,
    table: &Table,
    choice: &str,
    known: impl Iterator<Item = String>,
) -> Result<()> {
    let Some(key) = table.keys().next() else { return Ok(()) };
    let known: Vec<String> = known.collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let message = match known.contains(&key.as_str()) {
        true => format!("`{key}` is no setting of {choice}"),
        false => unknown_value(key, &known),
    };
    Err(Error::recipe(format!("{place}.{key}"), message))
}
