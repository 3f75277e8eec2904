//! The `[dynamics]` table: how parameters move, and the settings of that.

use toml::Table;

use super::table::{TableKey, fields, keys_of, nothing_left, settings, take};
use crate::Result;
use crate::dynamics::{DYNAMICS, DynamicsConfig};

/// Name of the table.
const TABLE: &str = "dynamics";

/// All keys of the `[dynamics]` table.
pub fn dynamics_keys() -> Vec<TableKey> {
    let method = format!("How parameters move: {} [default: {}].", DYNAMICS.join(", "), DYNAMICS[0]);
    let mut keys = vec![TableKey { name: "method".into(), doc: method }];
    keys.extend(keys_of(DYNAMICS, |name| fields(TABLE, &DynamicsConfig::by_name(name).ok()?).ok()));
    keys
}

/// Reads the table.
pub(super) fn parse(table: &Table) -> Result<DynamicsConfig> {
    let mut table = table.clone();
    let name: String = take(TABLE, &mut table, "method")?.unwrap_or_else(|| DYNAMICS[0].into());
    let config = settings(TABLE, &mut table, &DynamicsConfig::by_name(&name)?)?;
    nothing_left(TABLE, &table, &format!("`{name}`"), dynamics_keys().into_iter().map(|k| k.name))?;
    Ok(config)
}
