//! What an adapter's file says of the base that it was made for: the hash of its weights, and the settings that make them a
//! function (epsilons, rotary positions, soft caps, tying, ...), which no hash of weights sees.

use std::collections::BTreeMap;
use std::path::Path;

use crate::attach::BaseCheck;
use crate::config::AdapterConfig;
use crate::module::Host;
use crate::{Error, Result};

/// Metadata key of the base's content hash in a weights file.
pub const BASE_HASH_KEY: &str = "espalier.base_hash";
/// Metadata key of the base's settings in a weights file: a JSON object of texts.
pub const BASE_SETTINGS_KEY: &str = "espalier.base_settings";

/// The marks of `host`, by metadata key.
///
/// # Errors
/// If the base's weights cannot be read.
pub(super) fn of(host: &dyn Host) -> Result<BTreeMap<String, String>> {
    let mut marks = BTreeMap::from([(BASE_HASH_KEY.to_owned(), host.base_hash()?)]);
    let settings = host.settings();
    if !settings.is_empty() {
        let text = serde_json::to_string(&settings).map_err(|e| Error::config(BASE_SETTINGS_KEY, e.to_string()))?;
        marks.insert(BASE_SETTINGS_KEY.to_owned(), text);
    }
    Ok(marks)
}

/// Puts the marks of the file at `path` into `config`; `get` gives its metadata.
///
/// # Errors
/// If the settings are no JSON object of texts.
pub(super) fn take(path: &Path, config: &mut AdapterConfig, get: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    config.base_hash = get(BASE_HASH_KEY);
    config.base_settings = match get(BASE_SETTINGS_KEY) {
        None => None,
        Some(text) => {
            let wrong = |e: serde_json::Error| Error::format(path, format!("`{BASE_SETTINGS_KEY}`: {e}"));
            Some(serde_json::from_str(&text).map_err(wrong)?)
        }
    };
    Ok(())
}

/// Whether `host` is the base that the file at `path` was made for; another one is refused unless `allow`.
///
/// # Errors
/// If it is another one, or its weights cannot be read.
pub(super) fn check(host: &dyn Host, config: &AdapterConfig, path: &Path, allow: bool) -> Result<BaseCheck> {
    let mut forced = false;
    if let Some(expected) = &config.base_hash {
        let found = host.base_hash()?;
        if *expected != found {
            if !allow {
                return Err(Error::WrongBase { path: path.to_owned(), expected: expected.clone(), found });
            }
            forced = true;
        }
    }
    let own = host.settings();
    let other = |(key, there): (&String, &String)| match own.get(key) {
        Some(here) if here == there => None,
        here => Some(format!("{key} is {there} there and {} here", here.map_or("nothing", |h| h))),
    };
    let differing: Vec<String> = config.base_settings.iter().flatten().filter_map(other).collect();
    if !differing.is_empty() {
        if !allow {
            return Err(Error::OtherSettings { path: path.to_owned(), differing });
        }
        forced = true;
    }
    Ok(match (forced, config.base_hash.is_some(), config.base_settings.is_some() || own.is_empty()) {
        (true, ..) => BaseCheck::Forced,
        (false, true, true) => BaseCheck::Same,
        (false, true, false) => BaseCheck::NoSettings,
        (false, false, _) => BaseCheck::NoHash,
    })
}
