//! Adapters that PEFT wrote, with what PEFT computes with them: every folder of `parity/golden/adapters`, by listing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::attach::Attached;
use espalier_adapters::config::BiasMode;
use espalier_adapters::formats::folder::{self, AdapterFiles, CONFIG_FILE};
use espalier_adapters::formats::safetensors::TensorFile;
use espalier_adapters::target::TargetSpec;
use espalier_adapters::{AdapterConfig, Host, MethodConfig, ModuleMut};
use espalier_models::{LoadOptions, Model};
use serde_json::Value;

use crate::root;

/// The folder of golden files.
pub fn folder() -> PathBuf {
    root().join("parity/golden")
}

/// The folders in `folder`, sorted.
///
/// # Errors
/// If it cannot be listed.
pub fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.is_dir());
    paths.sort();
    Ok(paths)
}

/// The last part of a path.
pub fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// All tensors of a file.
///
/// # Errors
/// If it cannot be read.
pub fn tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    Ok(TensorFile::open(path)?.load_all(&Device::Cpu)?)
}

/// One adapter that PEFT wrote.
#[derive(Debug, Clone)]
pub struct Case {
    /// Name of its folder.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// Folder of its base.
    pub base: PathBuf,
    /// A word of the reason for which it must be refused, where it must be.
    pub refused: Option<String>,
}

/// All of them.
///
/// # Errors
/// If the golden files cannot be listed.
pub fn cases() -> Result<Vec<Case>> {
    let of = |path: PathBuf| -> Result<Case> {
        let config = path.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&config).with_context(|| config.display().to_string())?;
        let json: Value = serde_json::from_str(&text)?;
        let base =
            json["base_model_name_or_path"].as_str().with_context(|| format!("{}: no base", config.display()))?;
        let refused = std::fs::read_to_string(path.join("refused.txt")).ok().map(|word| word.trim().to_owned());
        Ok(Case { name: name_of(&path), base: folder().join(base), refused, path })
    };
    listed(&folder().join("adapters"))?.into_iter().map(of).collect()
}

impl Case {
    /// What PEFT computes.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn expected(&self) -> Result<BTreeMap<String, Tensor>> {
        tensors(&self.path.join("expected.safetensors"))
    }

    /// Its base in `dtype`.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn model(&self, dtype: DType) -> Result<Model> {
        Model::load(&self.base, &LoadOptions { dtype, ..LoadOptions::cpu() }).with_context(|| self.name.clone())
    }

    /// Number of classes, where its base is a classifier.
    ///
    /// # Errors
    /// If the base cannot be loaded.
    pub fn labels(&self) -> Result<Option<usize>> {
        Ok(self.model(DType::F32)?.config().labels())
    }

    /// The adapter on `model`.
    ///
    /// # Errors
    /// If it is refused.
    pub fn attach(&self, model: &mut Model) -> espalier_adapters::Result<Attached> {
        self.attach_files(model, folder::read(&self.path)?)
    }

    /// An adapter of the same settings with other tensors on `model`.
    ///
    /// # Errors
    /// If it is refused.
    pub fn attach_files(&self, model: &mut Model, files: AdapterFiles) -> espalier_adapters::Result<Attached> {
        folder::load(model, files, false, DType::F32, &Device::Cpu)
    }

    /// What of PEFT the case uses, in words: the method, what of its settings is not as it comes, and what is beside it.
    ///
    /// # Errors
    /// If the settings cannot be read.
    pub fn uses(&self) -> Result<String> {
        let config = folder::read_config(&self.path)?;
        let mut words = vec![config.method.name().to_owned()];
        words.extend(settings(&config.method)?);
        words.extend(beside(&config));
        let (mut turned, mut table) = (false, false);
        let mut model = self.model(DType::F32)?;
        let attached = self.attach(&mut model)?;
        model.walk(&mut |module| {
            let adapted = attached.layers.contains_key(module.path());
            match module {
                ModuleMut::Linear(m) => turned |= adapted && m.transposed_on_disk(),
                ModuleMut::Embedding(_) => table |= adapted,
                ModuleMut::Norm(_) => {}
            }
            Ok(())
        })?;
        words.extend(turned.then(|| "Conv1D".to_owned()));
        words.extend(table.then(|| "Embedding".to_owned()));
        Ok(words.join(", "))
    }
}

/// Switches that are on and words that are not as they come.
fn settings(method: &MethodConfig) -> Result<Vec<String>> {
    let default = serde_json::to_value(MethodConfig::by_name(method.name())?)?;
    let Value::Object(own) = serde_json::to_value(method)? else { return Ok(Vec::new()) };
    let word = |(key, value): (String, Value)| match value {
        Value::Bool(true) => Some(key),
        Value::String(text) if default[&key] != Value::String(text.clone()) => Some(text),
        _ => None,
    };
    Ok(own.into_iter().filter_map(word).collect())
}

/// What stands beside the method.
fn beside(config: &AdapterConfig) -> Vec<String> {
    let TargetSpec { exclude_modules, layers_to_transform, rank_pattern, alpha_pattern, .. } = &config.targets;
    let all = [
        (!rank_pattern.is_empty() || !alpha_pattern.is_empty(), "patterns"),
        (exclude_modules.is_some() || layers_to_transform.is_some(), "narrowed"),
        (config.bias == BiasMode::LoraOnly, "bias lora_only"),
        (config.bias == BiasMode::All, "bias all"),
        (!config.modules_to_save.is_empty(), "modules_to_save"),
        (config.trainable_tokens.is_some(), "trainable tokens"),
        (config.tie_weights, "tied"),
    ];
    all.into_iter().filter(|(is, _)| *is).map(|(_, word)| word.to_owned()).collect()
}
