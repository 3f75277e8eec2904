//! Checkpoints: everything a run needs to go on to the same bits.
//!
//! A checkpoint is a folder `step-NNNNNN` with the trained parameters, the optimiser's moments and a small JSON state. All
//! random numbers and batches are functions of (seed, step), so no generator state is stored. The folder appears whole
//! or not at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use espalier_adapters::ParameterMap;
use espalier_adapters::formats::{atomic, safetensors};
use serde::{Deserialize, Serialize};

use crate::dynamics::adamw::AdamW;
use crate::identity::Identity;
use crate::live::Liveness;
use crate::{Error, Result};

const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Where a run stands after a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps taken.
    pub step: usize,
    /// Epoch of the next batch.
    pub epoch: u64,
    /// Next batch of the epoch.
    pub batch: usize,
    /// Tokens seen, padding aside.
    pub tokens: u64,
    /// Tokens or rows that had a target.
    pub trained_tokens: u64,
    /// Loss before the last step.
    #[serde(default)]
    pub loss: f64,
    /// Seconds of training so far.
    pub elapsed_s: f64,
    /// Step of the last evaluation.
    #[serde(default)]
    pub evaluated: Option<usize>,
    /// Best evaluation so far; None while every evaluation was no number.
    #[serde(default, deserialize_with = "number_or_none")]
    pub best: Option<Best>,
    /// Evaluations since the best.
    pub since_best: usize,
    /// What the watch over the first steps of the last start found.
    #[serde(default)]
    pub live: Option<Liveness>,
    /// What the run is made of: its recipe, its data's key and its base's hash.
    pub identity: Identity,
}

/// The best evaluation of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: usize,
    /// Its loss.
    pub loss: f64,
}

/// Earlier versions kept an evaluation that was no number as the best, with a loss of `null`.
fn number_or_none<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Option<Best>, D::Error> {
    #[derive(Deserialize)]
    struct Written {
        step: usize,
        loss: Option<f64>,
    }
    let written = Option::<Written>::deserialize(from)?;
    Ok(written.and_then(|best| Some(Best { step: best.step, loss: best.loss? })))
}

/// Name of the folder of a step.
pub fn folder_name(step: usize) -> String {
    format!("step-{step:06}")
}

/// Checkpoints under `folder`, by rising step. Folders that are not whole (left by a kill) are passed over.
pub fn list(folder: &Path) -> Vec<(usize, PathBuf)> {
    let mut found: Vec<(usize, PathBuf)> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            entry.path().join(STATE).is_file().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// Writes a checkpoint under `folder`; gives its path.
///
/// # Errors
/// If it cannot be written; earlier checkpoints are whole then.
pub fn save(folder: &Path, state: &State, parameters: &ParameterMap, optimizer: &AdamW) -> Result<PathBuf> {
    let path = folder.join(folder_name(state.step));
    atomic::replace_folder(&path, |temp| -> Result<()> {
        let entries =
            parameters.trainable().map(|p| safetensors::Entry::of(p.name.clone(), &p.tensor.detach())).collect();
        safetensors::write(&temp.join(PARAMETERS), entries, &BTreeMap::new())?;
        let entries = optimizer.state().iter().map(|(n, t)| safetensors::Entry::of(n.clone(), t)).collect();
        safetensors::write(&temp.join(OPTIMIZER), entries, &BTreeMap::new())?;
        let json = serde_json::to_string_pretty(state).map_err(|e| Error::run(&path, e.to_string()))?;
        atomic::write(&temp.join(STATE), |out| writeln!(out, "{json}"))?;
        Ok(())
    })?;
    Ok(path)
}

/// Reads the state of a checkpoint.
///
/// # Errors
/// If it is missing or malformed.
pub fn read_state(path: &Path) -> Result<State> {
    let file = path.join(STATE);
    let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
    serde_json::from_str(&text).map_err(|e| Error::run(file, e.to_string()))
}

/// Puts the trained parameters of a checkpoint into the variables.
///
/// # Errors
/// If a tensor is missing, left over, or has another shape.
pub fn restore_parameters(path: &Path, parameters: &ParameterMap) -> Result<()> {
    let file = path.join(PARAMETERS);
    let mut tensors = safetensors::TensorFile::open(&file)?.load_all(&Device::Cpu)?;
    for parameter in parameters.trainable() {
        let saved = tensors
            .remove(&parameter.name)
            .ok_or_else(|| Error::run(&file, format!("`{}` is missing", parameter.name)))?;
        if saved.shape() != parameter.tensor.shape() {
            let (found, wanted) = (saved.shape().clone(), parameter.tensor.shape().clone());
            return Err(Error::run(&file, format!("`{}` has shape {found:?}, wanted {wanted:?}", parameter.name)));
        }
        let saved = saved.to_dtype(parameter.tensor.dtype())?.to_device(parameter.tensor.device())?;
        parameter.var()?.set(&saved)?;
    }
    match tensors.into_keys().next() {
        Some(name) => Err(Error::run(file, format!("`{name}` belongs to no parameter of this run"))),
        None => Ok(()),
    }
}

/// Puts a whole checkpoint back: parameters, moments, state.
///
/// # Errors
/// If a file is missing, malformed, or does not fit this run.
pub fn restore(path: &Path, parameters: &ParameterMap, optimizer: &mut AdamW) -> Result<State> {
    let state = read_state(path)?;
    restore_parameters(path, parameters)?;
    let moments: BTreeMap<String, Tensor> =
        safetensors::TensorFile::open(&path.join(OPTIMIZER))?.load_all(&Device::Cpu)?;
    let moments = moments.into_iter().map(|(n, t)| Ok((n, t.to_dtype(DType::F32)?))).collect::<Result<_>>()?;
    optimizer.restore(moments, state.step)?;
    Ok(state)
}

/// Puts right what killed writers left among the checkpoints; says what was found, one line each.
///
/// # Errors
/// If a leftover cannot be renamed or removed.
pub fn recover(folder: &Path) -> Result<Vec<String>> {
    let found = atomic::recover(folder)?;
    let mut lines = Vec::new();
    for path in &found.restored {
        lines.push(format!("{} was put back: a run had been killed while it replaced it", path.display()));
    }
    if !found.removed.is_empty() {
        let n = found.removed.len();
        lines.push(format!(
            "{n} unfinished or replaced checkpoints of killed runs were removed from {}",
            folder.display()
        ));
    }
    Ok(lines)
}

/// Removes old checkpoints, keeping the newest `keep` and the one of step `best`.
///
/// # Errors
/// If one cannot be removed.
pub fn prune(folder: &Path, keep: usize, best: Option<usize>) -> Result<()> {
    let all = list(folder);
    let old = all.len().saturating_sub(keep.max(1));
    for (step, path) in all.into_iter().take(old) {
        if Some(step) != best {
            atomic::remove_folder(&path)?;
        }
    }
    Ok(())
}
