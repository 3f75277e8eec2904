//! What a run is made of, and how it differs from what a checkpoint was made of: a resumed run is refused where a difference
//! would change what is computed, and says where bits may differ or something cannot be checked.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DeviceLocation;
use espalier_adapters::Host;
use espalier_adapters::formats::folder::{CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::{hash, safetensors::TensorFile};
use espalier_models::Model;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::trainer::Run;
use crate::{Error, Result};

/// What a run is made of; resuming checks it. Fields that are None are of checkpoints written before they were recorded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Resolved recipe, one value a key.
    pub recipe: BTreeMap<String, String>,
    /// Content key of the data.
    pub data: String,
    /// Content hash of the base's tensors.
    pub base: String,
    /// What the base's `config.json`, or the metadata of its GGUF file, says of the architecture: JSON values by key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<BTreeMap<String, String>>,
    /// Content hash of the adapter that training started from, `none` for a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<String>,
    /// What it was computed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
}

/// What a run is computed with, as resolved from the recipe and the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Dtype of activations and dense weights.
    pub dtype: String,
    /// Kind of device: `cpu` or `cuda`.
    pub device: String,
    /// Instructions of the CPU's kernels.
    pub instructions: String,
    /// Version of this program.
    pub version: String,
}

/// Keys that may differ when a run goes on, because they do not change what is computed, each with the reason.
const FREE: &[(&str, &str)] = &[
    ("out", "the folder itself is what the run goes on in"),
    ("save_every", "a checkpoint changes nothing of what follows it"),
    ("keep_checkpoints", "a checkpoint changes nothing of what follows it"),
    ("cache_dir", "the tokens are compared, wherever they are kept"),
    ("tags", "they stand in the model card only"),
    ("checkpointing", "blocks that are recomputed give the same bits"),
    ("device", "the dtype in use is compared; another device is said, as bits may differ there"),
    ("allow_base", "the base is compared by its content"),
];

/// Keys in place of which what they stood for is compared.
const RESOLVED: [&str; 2] = ["dtype", "init_adapter"];

/// Why a recipe key may differ when a run goes on; None if it may not.
pub fn why_free(key: &str) -> Option<&'static str> {
    FREE.iter().find(|(free, _)| *free == key).map(|(_, why)| *why)
}

/// Whether what a recipe key stands for is compared in place of its value.
pub fn is_resolved(key: &str) -> bool {
    RESOLVED.contains(&key)
}

/// Whether a key of a `config.json` says nothing about what the model computes.
pub fn without_meaning(key: &str) -> bool {
    WITHOUT_MEANING.contains(&key)
}

/// Keys of a `config.json` that say nothing about what the model computes.
const WITHOUT_MEANING: &[&str] = &[
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
];

impl Identity {
    /// What `run` is made of.
    ///
    /// # Errors
    /// If the recipe cannot be written out, or the base or the start adapter cannot be read.
    pub fn of(run: &Run) -> Result<Self> {
        let table = toml::Table::try_from(&run.recipe).map_err(|e| Error::recipe("recipe", e.to_string()))?;
        let start = run.recipe.init_adapter.as_deref().map(|path| adapter_hash(Path::new(path))).transpose()?;
        Ok(Self {
            recipe: table.into_iter().map(|(k, v)| (k, v.to_string())).collect(),
            data: run.data.key.clone(),
            base: run.model.base_hash()?,
            config: Some(config(&run.model)),
            init_adapter: Some(start.unwrap_or_else(|| "none".into())),
            machine: Some(Machine::of(&run.model)?),
        })
    }

    /// Differences that would change what is computed, one line each.
    pub fn changes(&self, now: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        let absent = "(absent)".to_owned();
        let keys = |a: &BTreeMap<String, String>, b: &BTreeMap<String, String>| {
            let mut keys: Vec<String> = a.keys().chain(b.keys()).cloned().collect();
            keys.sort();
            keys.dedup();
            keys
        };
        let mut differ = |what: &str, old: &BTreeMap<String, String>, new: &BTreeMap<String, String>, free: &[&str]| {
            for key in keys(old, new).iter().filter(|key| !free.contains(&key.as_str())) {
                let (old, new) = (old.get(key).unwrap_or(&absent), new.get(key).unwrap_or(&absent));
                if old != new {
                    lines.push(format!("  {what} {key}: was {old}, now {new}"));
                }
            }
        };
        // Where both sides say what a name stood for, that is compared in place of the name.
        let mut free: Vec<&str> = FREE.iter().map(|(key, _)| *key).collect();
        let [dtype, start] = RESOLVED;
        free.extend((self.machine.is_some() && now.machine.is_some()).then_some(dtype));
        free.extend((self.init_adapter.is_some() && now.init_adapter.is_some()).then_some(start));
        differ("recipe", &self.recipe, &now.recipe, &free);
        if let (Some(old), Some(new)) = (&self.config, &now.config) {
            differ("base model's config", old, new, &[]);
        }
        if let (Some(old), Some(new)) = (&self.machine, &now.machine)
            && old.dtype != new.dtype
        {
            lines.push(format!(
                "  dtype in use: was {} on {}, now {} on {}",
                old.dtype, old.device, new.dtype, new.device
            ));
        }
        if let (Some(old), Some(new)) = (&self.init_adapter, &now.init_adapter)
            && old != new
        {
            lines.push(format!("  init_adapter: content was {old}, now {new}"));
        }
        for (what, old, new) in [("data", &self.data, &now.data), ("base model", &self.base, &now.base)] {
            if old != new {
                lines.push(format!("  {what}: content was {old}, now {new}"));
            }
        }
        lines
    }

    /// What a run that goes on should say: where bits may differ from those of a run without the stop, and what the
    /// checkpoint does not record.
    pub fn notices(&self, now: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        if let (Some(old), Some(new)) = (&self.machine, &now.machine) {
            let parts = [
                ("device", &old.device, &new.device),
                ("CPU instructions", &old.instructions, &new.instructions),
                ("version", &old.version, &new.version),
            ];
            let changed: Vec<String> =
                parts.iter().filter(|p| p.1 != p.2).map(|(what, a, b)| format!("{what} {a}, now {b}")).collect();
            if !changed.is_empty() {
                lines.push(format!(
                    "the checkpoint was made with another {}: the bits may differ from those of a run without the stop",
                    changed.join("; another ")
                ));
            }
        }
        let missing: Vec<&str> = [
            (self.config.is_none(), "the base's config.json"),
            (self.init_adapter.is_none(), "the content of init_adapter"),
            (self.machine.is_none(), "dtype, device and CPU instructions in use"),
        ]
        .into_iter()
        .filter_map(|(absent, what)| absent.then_some(what))
        .collect();
        if !missing.is_empty() {
            lines.push(format!(
                "the checkpoint is of an earlier version, so these are not checked: {}",
                missing.join("; ")
            ));
        }
        lines
    }
}

impl Machine {
    /// What `model` is computed with.
    ///
    /// # Errors
    /// If the environment asks for unknown CPU instructions.
    fn of(model: &Model) -> Result<Self> {
        let instructions = espalier_kernels::instructions().map_err(|message| Error::recipe("environment", message))?;
        Ok(Self {
            dtype: model.dtype().as_str().to_owned(),
            device: match model.device().location() {
                DeviceLocation::Cpu => "cpu",
                DeviceLocation::Cuda { .. } => "cuda",
                DeviceLocation::Metal { .. } => "metal",
            }
            .to_owned(),
            instructions: instructions.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }
}

/// What a `config.json`, or the keys made of a GGUF file's metadata, says of the architecture.
fn config(model: &Model) -> BTreeMap<String, String> {
    let keys = model.config().raw.as_object().into_iter().flatten();
    keys.filter(|(key, value)| !value.is_null() && !without_meaning(key))
        .map(|(key, value)| (key.clone(), sorted(value).to_string()))
        .collect()
}

/// The value with the keys of its objects in order.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let ordered: BTreeMap<&String, &Value> = map.iter().collect();
            Value::Object(ordered.into_iter().map(|(k, v)| (k.clone(), sorted(v))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

/// Content hash of an adapter folder: its settings as values, and its tensors.
///
/// # Errors
/// If a file is missing or malformed.
fn adapter_hash(folder: &Path) -> Result<String> {
    let file = folder.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
    let settings: Value =
        serde_json::from_str(&text).map_err(|e| Error::recipe(file.display().to_string(), e.to_string()))?;
    let tensors = hash::of_files(&[TensorFile::open(&folder.join(WEIGHTS_FILE))?])?;
    Ok(hash::of_parts([sorted(&settings).to_string().as_bytes(), tensors.as_bytes()].into_iter()))
}
