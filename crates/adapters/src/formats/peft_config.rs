//! PEFT's `adapter_config.json`, read and written.
//!
//! Reading consumes every key: one that is not understood and not at its harmless default is an error, so that no setting
//! is dropped in silence.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::adapter::Reach;
use crate::config::{AdapterConfig, BiasMode};
use crate::parametrisation::MethodConfig;
use crate::target::TargetSpec;
use crate::{Error, Result};

/// Keys that say nothing about the function computed, whatever their value.
const INFORMATIVE: &[&str] = &[
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "transformers_version",
    "init_weights",
    "init_ia3_weights",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
];

/// Name of what stands before the sequences, in files.
pub const PROMPT_EMBEDDINGS: &str = "prompt_embeddings";

/// `peft_type` of methods that PEFT lacks.
const NATIVE: &str = "ESPALIER";

/// Writes `config`; keys of the method come from the method itself. `trains_embedding`: something of the token table or the output
/// head is trained, so that it matters whether the two stay tied.
///
/// # Errors
/// If a value cannot be written as JSON.
pub fn to_json(config: &AdapterConfig, trains_embedding: bool) -> Result<Value> {
    let mut keys = match config.method.to_peft() {
        Some(keys) => keys,
        None => {
            let mut keys = object(&config.method)?;
            keys.remove("method");
            keys.insert("peft_type".into(), NATIVE.into());
            keys.insert("espalier_method".into(), config.method.name().into());
            keys
        }
    };
    let lora = keys.get("peft_type").is_some_and(|kind| kind == "LORA");
    let rows = matches!(config.method.reach(), Reach::Rows { .. });
    let mut put = |key: &str, value: Value| {
        // Other methods of PEFT know fewer keys; those that say something are written all the same.
        if lora || !is_unset(&value) {
            keys.insert(key.into(), value);
        }
    };
    put("auto_mapping", Value::Null);
    put("base_model_name_or_path", json!(config.base));
    if lora || config.bias != BiasMode::None {
        put("bias", value(&config.bias)?);
    }
    put("fan_in_fan_out", false.into());
    put("inference_mode", true.into());
    put("layer_replication", Value::Null);
    put("modules_to_save", if config.modules_to_save.is_empty() { Value::Null } else { json!(config.modules_to_save) });
    put("revision", json!(config.revision));
    put("task_type", value(&config.task)?);
    put("trainable_token_indices", value(&config.trainable_tokens)?);
    // Rows alone always reach a tied head.
    if config.tie_weights && trains_embedding && !rows {
        put("ensure_weight_tying", true.into());
    }
    // A method that acts on no module has no targets.
    let targets = match config.method.reach() {
        Reach::Sequence => Map::new(),
        _ => object(&config.targets)?,
    };
    for key in ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"] {
        put(key, targets.get(key).cloned().unwrap_or(Value::Null));
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        put(key, targets.get(key).cloned().unwrap_or_else(|| json!({})));
    }
    let mut sorted: Vec<_> = keys.into_iter().collect();
    sorted.sort_by(|x, y| x.0.cmp(&y.0));
    Ok(Value::Object(sorted.into_iter().collect()))
}

/// Reads a file's JSON.
///
/// # Errors
/// If the method is not known, a value is not valid, or a key that matters is not understood.
pub fn from_json(json: Value) -> Result<AdapterConfig> {
    let Value::Object(mut keys) = json else {
        return Err(Error::config("adapter_config.json", "the file must hold one JSON object"));
    };
    let method = match keys.get("espalier_method").and_then(Value::as_str).map(str::to_owned) {
        Some(name) => native(&name, &mut keys)?,
        None => MethodConfig::from_peft(&mut keys)?,
    };
    let rows = matches!(method.reach(), Reach::Rows { .. });
    let mut take = |key: &str| keys.remove(key).filter(|v| !v.is_null());
    let mut targets = Map::new();
    for key in
        ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"]
    {
        if let Some(value) = take(key) {
            // Alone first, so that an error names the key.
            parse::<TargetSpec>(key, json!({ key: value.clone() }))?;
            targets.insert(key.into(), value);
        }
    }
    if method.reach() == Reach::Sequence && targets.is_empty() {
        targets = object(&TargetSpec::of(Reach::Sequence))?;
    }
    if !targets.contains_key("target_modules") {
        return Err(Error::config("target_modules", "missing: the file does not say which modules are adapted"));
    }
    let config = AdapterConfig {
        targets: parse::<TargetSpec>("target_modules", Value::Object(targets))?,
        bias: take("bias").map_or(Ok(BiasMode::None), |v| parse("bias", v))?,
        modules_to_save: take("modules_to_save").map_or(Ok(Vec::new()), |v| parse("modules_to_save", v))?,
        trainable_tokens: take("trainable_token_indices").map(|v| parse("trainable_token_indices", v)).transpose()?,
        tie_weights: take("ensure_weight_tying").map_or(Ok(rows), |v| parse("ensure_weight_tying", v))?,
        task: take("task_type").map(|v| parse("task_type", v)).transpose()?,
        base: take("base_model_name_or_path").map(|v| parse("base_model_name_or_path", v)).transpose()?,
        revision: take("revision").map(|v| parse("revision", v)).transpose()?,
        base_hash: None,
        base_settings: None,
        method,
    };
    match keys.into_iter().find(|(key, value)| !INFORMATIVE.contains(&key.as_str()) && !is_unset(value)) {
        Some((key, value)) => {
            Err(Error::config(key, format!("{value} is not supported, and ignoring it would change the results")))
        }
        None => Ok(config),
    }
}

/// Reads a method that PEFT lacks from the layout of [`to_json`].
fn native(name: &str, keys: &mut Map<String, Value>) -> Result<MethodConfig> {
    keys.remove("espalier_method");
    if let Some(other) = keys.remove("peft_type").filter(|found| found != NATIVE) {
        return Err(Error::config(
            "peft_type",
            format!("{other} beside espalier_method = \"{name}\", expected {NATIVE:?}"),
        ));
    }
    let mut fields = object(&MethodConfig::by_name(name)?)?;
    for (key, value) in &mut fields {
        if let Some(found) = keys.remove(key) {
            *value = found;
        }
    }
    parse("espalier_method", Value::Object(fields))
}

/// What PEFT calls a method and its settings.
#[derive(Debug, Clone, Copy)]
pub struct PeftNames {
    /// `peft_type`.
    pub kind: &'static str,
    /// Settings that PEFT has under another key: (ours, PEFT's).
    pub keys: &'static [(&'static str, &'static str)],
    /// PEFT's keys of which one value is supported, with that value as JSON: written so, and expected so.
    pub fixed: &'static [(&'static str, &'static str)],
}

impl PeftNames {
    fn theirs<'a>(&self, ours: &'a str) -> &'a str {
        self.keys.iter().find(|(own, _)| *own == ours).map_or(ours, |(_, theirs)| theirs)
    }
}

/// Settings under PEFT's keys; None if they are no object, which the settings of no method are.
pub(crate) fn settings_to_keys<M: Serialize>(method: &M, names: &PeftNames) -> Option<Map<String, Value>> {
    let own = object(method).ok()?;
    let mut keys: Map<String, Value> =
        own.into_iter().map(|(key, value)| (names.theirs(&key).to_owned(), whole(value))).collect();
    keys.insert("peft_type".into(), names.kind.into());
    for (key, value) in names.fixed {
        keys.insert((*key).into(), serde_json::from_str(value).ok()?);
    }
    Some(keys)
}

/// Settings from PEFT's keys, which are removed; None if the file is of another method. Keys that are absent or null keep our
/// defaults.
pub(crate) fn settings_from_keys<M: Serialize + DeserializeOwned + Default>(
    keys: &mut Map<String, Value>,
    names: &PeftNames,
) -> Result<Option<M>> {
    if keys.get("peft_type").and_then(Value::as_str) != Some(names.kind) {
        return Ok(None);
    }
    keys.remove("peft_type");
    let defaults = object(&M::default())?;
    let mut own = defaults.clone();
    for (key, value) in &mut own {
        let theirs = names.theirs(key);
        if let Some(found) = keys.remove(theirs).filter(|found| !found.is_null()) {
            // Alone first, so that an error names the key.
            let mut one = defaults.clone();
            one.insert(key.clone(), found.clone());
            parse::<M>(theirs, Value::Object(one))
                .map_err(|_| Error::config(theirs, format!("{found} is not valid for {}", names.kind)))?;
            *value = found;
        }
    }
    for (key, value) in names.fixed {
        match keys.remove(*key) {
            Some(found) if !found.is_null() && !same_value(&found, value) => {
                return Err(Error::config(*key, format!("{found} is not supported for {}, only {value}", names.kind)));
            }
            _ => {}
        }
    }
    parse(names.kind, Value::Object(own)).map(Some)
}

fn same_value(found: &Value, text: &str) -> bool {
    match (found.as_f64(), text.parse::<f64>()) {
        (Some(x), Ok(y)) => x == y,
        _ => serde_json::from_str::<Value>(text).is_ok_and(|value| value == *found),
    }
}

/// Writes 16.0 as the integer that PEFT writes.
fn whole(value: Value) -> Value {
    match value.as_f64() {
        Some(x) if value.is_f64() && x.fract() == 0.0 && x.abs() < 1e15 => Value::from(x as i64),
        _ => value,
    }
}

fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

fn parse<T: DeserializeOwned>(key: &str, value: Value) -> Result<T> {
    serde_json::from_value(value.clone()).map_err(|e| Error::config(key, format!("{value} is not valid: {e}")))
}

fn value<T: Serialize>(item: &T) -> Result<Value> {
    serde_json::to_value(item).map_err(|e| Error::config("adapter_config.json", e.to_string()))
}

fn object<T: Serialize>(item: &T) -> Result<Map<String, Value>> {
    match value(item)? {
        Value::Object(map) => Ok(map),
        other => Err(Error::config("adapter_config.json", format!("{other} is not an object"))),
    }
}
