//! A file of Microsoft's loralib: bare factors `X.lora_A` [r, d_in] and `X.lora_B` [d_out, r], and the tensors of heads trained
//! beside them. There are no settings: the rank is in the shapes, and the scaling numerator must be given.
//!
//! Source: github.com/microsoft/LoRA, `lora_state_dict`; scaling alpha / r

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::Device;

use super::folder::{AdapterFiles, check_finite};
use super::safetensors::TensorFile;
use crate::config::{AdapterConfig, BiasMode};
use crate::parametrisation::MethodConfig;
use crate::parametrisation::lora::Lora;
use crate::target::{Pattern, TargetSpec};
use crate::{Error, Result};

/// Reads the file at `path`, scaled by `alpha` / r.
///
/// # Errors
/// If `alpha` is not given, a factor is missing, or ranks differ within a pair.
pub(super) fn read(path: &Path, alpha: Option<f64>) -> Result<AdapterFiles> {
    let alpha = alpha.ok_or_else(|| {
        let what =
            "files of loralib do not hold the scaling numerator; give it (the scripts of its authors use 16 or 32)";
        Error::config("alpha", format!("{}: {what}", path.display()))
    })?;
    let file = TensorFile::open(path)?;
    let mut tensors = BTreeMap::new();
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    let mut whole = BTreeSet::new();
    let mut biases = BTreeSet::new();
    for (key, tensor) in file.load_all(&Device::Cpu)? {
        check_finite(path, &key, &tensor)?;
        if let Some(place) = key.strip_suffix(".lora_A") {
            ranks.insert(place.to_owned(), tensor.dims().first().copied().unwrap_or(0));
            tensors.insert(format!("{place}.lora_A.weight"), tensor);
        } else if key.ends_with(".lora_B") {
            tensors.insert(format!("{key}.weight"), tensor);
        } else if let Some(place) = key.strip_suffix(".weight") {
            whole.insert(place.to_owned());
            tensors.insert(key, tensor);
        } else if let Some(place) = key.strip_suffix(".bias") {
            biases.insert(place.to_owned());
            tensors.insert(key, tensor);
        } else {
            let what = format!("tensor `{key}` is no factor, weight or bias");
            return Err(Error::format(path, what));
        }
    }
    let r = ranks.values().copied().max().unwrap_or(0);
    let rank_pattern =
        ranks.iter().filter(|(_, rank)| **rank != r).map(|(place, rank)| (regex::escape(place), *rank)).collect();
    let beside: Vec<&String> = biases.iter().filter(|place| !whole.contains(*place)).collect();
    let bias = match beside.as_slice() {
        [] => BiasMode::None,
        places if places.iter().all(|place| ranks.contains_key(*place)) => BiasMode::LoraOnly,
        _ => BiasMode::All,
    };
    let targets = TargetSpec {
        target_modules: Pattern::Endings(ranks.into_keys().collect()),
        rank_pattern,
        ..TargetSpec::default()
    };
    let method = MethodConfig::Lora(Lora { r, alpha, ..Lora::default() });
    let config = AdapterConfig {
        targets,
        bias,
        modules_to_save: whole.into_iter().collect(),
        tie_weights: false,
        ..AdapterConfig::new(method)
    };
    Ok(AdapterFiles { path: path.to_owned(), config, tensors, copies: BTreeMap::new(), gguf: None })
}
