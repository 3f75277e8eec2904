//! An adapter folder of mlx-lm: `adapter_config.json` with `lora_parameters`, and `adapters.safetensors`.
//!
//! Equation: y = x W + scale * (x A) B; with `m`, times m / ||W + scale (A B)^T|| by output
//! Shapes:   `X.lora_a` [d_in, r], `X.lora_b` [r, d_out], `X.m` `[d_out]`; an embedding's `lora_a` is [vocabulary, r]
//! Source:   mlx-lm, `tuner/lora.py`, `tuner/dora.py`, `tuner/utils.py`: `keys` name modules within each of the last `num_layers`
//!           layers, or by whole path; a table that is the output head too has its change there as well
//!
//! mlx-lm takes what it finds by name and leaves the rest without a word, so names and keys are written exactly.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use super::folder::{AdapterFiles, BASE_HASH_KEY, CONFIG_FILE, Saved, check_finite};
use super::products::{self, Product};
use super::{atomic, safetensors};
use crate::attach::Attached;
use crate::config::AdapterConfig;
use crate::module::{Host, ModuleMut};
use crate::parametrisation::MethodConfig;
use crate::parametrisation::dora::Dora;
use crate::parametrisation::lora::Lora;
use crate::target::{Pattern, TargetSpec};
use crate::{Error, Result};

/// Name of the weights file.
pub const WEIGHTS_FILE: &str = "adapters.safetensors";

const LAYERS: &str = "model.layers.";

/// A module path within its layer, and the layer's index.
fn within_layer(path: &str) -> Option<(usize, &str)> {
    let (index, rest) = path.strip_prefix(LAYERS)?.split_once('.')?;
    Some((index.parse().ok()?, rest))
}

fn is_table(path: &str) -> bool {
    path.rsplit('.').next().is_some_and(|last| last.starts_with("embed"))
}

struct Settings {
    dora: bool,
    layers: i64,
    lora: Lora,
    keys: Option<Vec<String>>,
    model: Option<String>,
}

fn settings(path: &Path) -> Result<Settings> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let json: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| Error::format(path, format!("no JSON object: {e}")))?;
    let wrong = |key: &str, what: &str| Error::config(format!("{}: {key}", path.display()), what);
    let dora = match json.get("fine_tune_type").map(|v| v.as_str().unwrap_or_default()) {
        None | Some("lora") => false,
        Some("dora") => true,
        Some(other) => {
            let what = format!("`{other}` is no adapter (known: lora, dora); whole weights are read as a model");
            return Err(wrong("fine_tune_type", &what));
        }
    };
    let layers =
        json.get("num_layers").and_then(Value::as_i64).ok_or_else(|| wrong("num_layers", "no whole number"))?;
    let parameters = json.get("lora_parameters").and_then(Value::as_object);
    let mut parameters = parameters.cloned().ok_or_else(|| wrong("lora_parameters", "missing"))?;
    let rank = parameters.remove("rank").and_then(|v| v.as_u64()).ok_or_else(|| wrong("rank", "no whole number"))?;
    let scale = parameters.remove("scale").and_then(|v| v.as_f64()).ok_or_else(|| wrong("scale", "no number"))?;
    let dropout = parameters.remove("dropout").map_or(Some(0.0), |v| v.as_f64());
    let dropout = dropout.ok_or_else(|| wrong("dropout", "no number"))?;
    let keys = match parameters.remove("keys") {
        None | Some(Value::Null) => None,
        Some(keys) => Some(serde_json::from_value(keys).map_err(|e| wrong("keys", &e.to_string()))?),
    };
    if let Some((key, value)) = parameters.into_iter().next() {
        let what = format!("{value} is not supported, and ignoring it would change the results");
        return Err(wrong(&format!("lora_parameters.{key}"), &what));
    }
    let model = json.get("model").and_then(Value::as_str).map(str::to_owned);
    let lora = Lora { r: rank as usize, alpha: scale * rank as f64, dropout, ..Lora::default() };
    Ok(Settings { dora, layers, lora, keys, model })
}

/// Reads an mlx-lm folder.
///
/// # Errors
/// If a file is missing or malformed, a tensor has no known name, or keys and tensors do not name the same modules.
pub(super) fn read(folder: &Path) -> Result<AdapterFiles> {
    let config_path = folder.join(CONFIG_FILE);
    let settings = settings(&config_path)?;
    let path = folder.join(WEIGHTS_FILE);
    let file = safetensors::TensorFile::open(&path)?;
    let mut tensors = BTreeMap::new();
    let mut modules = BTreeSet::new();
    for (key, tensor) in file.load_all(&Device::Cpu)? {
        check_finite(&path, &key, &tensor)?;
        let (module, part) = key.rsplit_once('.').unwrap_or(("", &key));
        let table = is_table(module);
        let name = match (part, table) {
            ("lora_a", false) => "lora_A.weight",
            ("lora_b", false) => "lora_B.weight",
            ("lora_a", true) => "lora_embedding_A",
            ("lora_b", true) => "lora_embedding_B",
            ("m", false) if settings.dora => "lora_magnitude_vector",
            _ => return Err(Error::format(&path, format!("tensor `{key}`: no name of an mlx-lm adapter"))),
        };
        if tensor.rank() != if part == "m" { 1 } else { 2 } {
            return Err(Error::format(&path, format!("tensor `{key}` has shape {:?}", tensor.dims())));
        }
        let tensor = if part == "m" { tensor } else { tensor.t()?.contiguous()? };
        modules.insert(module.to_owned());
        tensors.insert(format!("{module}.{name}"), tensor);
    }
    check_keys(&config_path, &settings, &modules)?;
    let method = match settings.dora {
        true => MethodConfig::Dora(Dora(settings.lora)),
        false => MethodConfig::Lora(settings.lora),
    };
    let targets =
        TargetSpec { target_modules: Pattern::Endings(modules.into_iter().collect()), ..TargetSpec::default() };
    let base_hash = file.metadata().get(BASE_HASH_KEY).cloned();
    let config = AdapterConfig { targets, base: settings.model, base_hash, ..AdapterConfig::new(method) };
    Ok(AdapterFiles { path: folder.to_owned(), config, tensors, copies: BTreeMap::new(), gguf: None })
}

/// Whether the keys name the modules of the file, and no more layers are in it than there should be.
fn check_keys(path: &Path, settings: &Settings, modules: &BTreeSet<String>) -> Result<()> {
    let layers: BTreeSet<usize> = modules.iter().filter_map(|m| within_layer(m)).map(|(i, _)| i).collect();
    if settings.layers > 0 && layers.len() as i64 > settings.layers {
        let (found, said) = (layers.len(), settings.layers);
        return Err(Error::format(path, format!("num_layers is {said}, but {found} layers are in the file")));
    }
    let Some(keys) = &settings.keys else { return Ok(()) };
    let names = |module: &str, key: &str| module == key || within_layer(module).is_some_and(|(_, rest)| rest == key);
    if let Some(module) = modules.iter().find(|m| !keys.iter().any(|key| names(m, key))) {
        return Err(Error::format(path, format!("`{module}` is in the file, but no key names it")));
    }
    match keys.iter().find(|key| !modules.iter().any(|m| names(m, key))) {
        Some(key) => Err(Error::format(path, format!("key `{key}` names no module of the file"))),
        None => Ok(()),
    }
}

/// The keys that name `paths` and nothing else, and the number of layers they hold for.
fn keys_of(host: &mut dyn Host, paths: &BTreeSet<&str>) -> Result<(Vec<String>, usize)> {
    let mut all = BTreeSet::new();
    host.walk(&mut |module| {
        if !matches!(module, ModuleMut::Norm(_)) {
            all.insert(module.path().to_owned());
        }
        Ok(())
    })?;
    let layers = all.iter().filter_map(|p| within_layer(p)).map(|(i, _)| i + 1).max().unwrap_or(0);
    let first = paths.iter().filter_map(|p| within_layer(p)).map(|(i, _)| i).min().unwrap_or(layers);
    let inside: BTreeSet<&str> = paths.iter().filter_map(|p| within_layer(p)).map(|(_, rest)| rest).collect();
    let named = |path: &String| within_layer(path).is_some_and(|(i, rest)| i >= first && inside.contains(rest));
    let exact = all.iter().filter(|p| named(p)).all(|p| paths.contains(p.as_str()));
    let outside = paths.iter().filter(|p| within_layer(p).is_none());
    let keys = match exact {
        true => inside.iter().chain(outside).map(|k| (*k).to_owned()).collect(),
        false => paths.iter().map(|k| (*k).to_owned()).collect(),
    };
    Ok((keys, (layers - first).max(1)))
}

/// Writes the adapter as an mlx-lm folder (created if absent; other files stay).
///
/// # Errors
/// If a part of it has no place there, a module has another name in mlx-lm, or a file cannot be written.
pub(super) fn save(host: &mut dyn Host, adapter: &Attached, folder: &Path) -> Result<Saved> {
    let products = products::of(host, adapter, "folder of mlx-lm")?;
    let Some(first) = products.first() else {
        return Err(Error::unsupported("an adapter without modules", "there is nothing to write"));
    };
    let dora = first.magnitude.is_some();
    if let Some(other) = products.iter().find(|p| p.magnitude.is_some() != dora) {
        return Err(Error::unsupported(
            format!("{} beside {}", other.path, first.path),
            "mlx-lm has one method for all",
        ));
    }
    let (tied, heads) = (host.tied_table(), host.head_paths());
    for Product { path, lookup, .. } in &products {
        if within_layer(path).is_none() && !heads.contains(path) && path != "model.embed_tokens" {
            return Err(Error::unsupported(
                format!("{path} in a folder of mlx-lm"),
                "the module has another name there",
            ));
        }
        if *lookup && tied.as_ref() == Some(path) && !adapter.config.tie_weights {
            let why = "mlx-lm changes the output head with it, this adapter does not";
            return Err(Error::unsupported(format!("{path}, the table of a tied model"), why));
        }
    }
    let rank = products.iter().map(|p| p.a.dim(0)).collect::<candle_core::Result<Vec<_>>>()?;
    let (rank, scale) = (rank.into_iter().max().unwrap_or(1), first.scale);
    let mut entries = Vec::new();
    for product in &products {
        let (a, b) = products::widened(product, rank, scale)?;
        let mut put = |part: &str, t: &Tensor| {
            entries.push(safetensors::Entry::of(format!("{}.{part}", product.path), t));
        };
        put("lora_a", &a.t()?.contiguous()?);
        put("lora_b", &b.t()?.contiguous()?);
        if let Some(magnitude) = &product.magnitude {
            put("m", magnitude);
        }
    }
    let paths: BTreeSet<&str> = products.iter().map(|p| p.path.as_str()).collect();
    let (keys, layers) = keys_of(host, &paths)?;
    let dropout = adapter.layers.values().next().map_or(0.0, |layer| layer.dropout());
    let config = json!({
        "fine_tune_type": if dora { "dora" } else { "lora" },
        "lora_parameters": {"dropout": dropout, "keys": keys, "rank": rank, "scale": scale},
        "model": adapter.config.base,
        "num_layers": layers,
    });
    let metadata = BTreeMap::from([(BASE_HASH_KEY.to_owned(), host.base_hash()?)]);
    let (tensors, mut bytes) = (entries.len(), 0);
    atomic::replace_files(folder, &[WEIGHTS_FILE, CONFIG_FILE], |temp| {
        bytes = safetensors::write(&temp.join(WEIGHTS_FILE), entries, &metadata)?;
        atomic::write(&temp.join(CONFIG_FILE), |out| writeln!(out, "{config:#}"))
    })?;
    Ok(Saved { tensors, bytes })
}
