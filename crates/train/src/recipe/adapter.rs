//! The `[adapter]` table: the method's own settings beside those of placement.

use espalier_adapters::AdapterConfig;
use espalier_adapters::parametrisation::{METHODS, MethodConfig};
use espalier_adapters::target::TargetSpec;
use toml::Table;

use super::table::{TableKey, fields, keys_of, nothing_left, read, settings, take};
use crate::{Error, Result};

/// Name of the table.
const TABLE: &str = "adapter";

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

/// All keys of the `[adapter]` table: placement, then the methods' own settings.
pub fn adapter_keys() -> Vec<TableKey> {
    let mut keys: Vec<TableKey> =
        ADAPTER_KEYS.iter().map(|(name, doc)| TableKey { name: (*name).into(), doc: (*doc).into() }).collect();
    keys.extend(keys_of(METHODS, |name| fields(TABLE, &MethodConfig::by_name(name).ok()?).ok()));
    keys
}

/// Reads the table.
pub(super) fn parse(table: &Table) -> Result<AdapterConfig> {
    let mut table = table.clone();
    let name: String = take(TABLE, &mut table, "method")?.unwrap_or_else(|| "lora".into());
    let default = MethodConfig::by_name(&name).map_err(|e| match e {
        espalier_adapters::Error::Config { message, .. } => Error::recipe("adapter.method", message),
        other => other.into(),
    })?;
    let method: MethodConfig = settings(TABLE, &mut table, &default)?;
    let mut targets = Table::new();
    for key in
        ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"]
    {
        if let Some(value) = table.remove(key) {
            targets.insert(key.into(), value);
        }
    }
    let named = targets.contains_key("target_modules");
    let read: TargetSpec = read(TABLE, &Table::new(), targets)?;
    let default = AdapterConfig::new(method);
    let target_modules = if named { read.target_modules } else { default.targets.target_modules.clone() };
    let config = AdapterConfig {
        targets: TargetSpec { target_modules, ..read },
        bias: take(TABLE, &mut table, "bias")?.unwrap_or_default(),
        modules_to_save: take(TABLE, &mut table, "modules_to_save")?.unwrap_or_default(),
        trainable_tokens: take(TABLE, &mut table, "trainable_tokens")?,
        tie_weights: take(TABLE, &mut table, "tie_weights")?.unwrap_or(true),
        ..default
    };
    let names = adapter_keys().into_iter().map(|k| k.name);
    nothing_left(TABLE, &table, &format!("method `{name}`"), names)?;
    Ok(config)
}
