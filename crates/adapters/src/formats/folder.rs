//! An adapter folder: `adapter_config.json` and `adapter_model.safetensors`, in PEFT's layout.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

pub use super::base_mark::{BASE_HASH_KEY, BASE_SETTINGS_KEY};
use super::peft_config::PROMPT_EMBEDDINGS;
use super::{atomic, base_mark, copies, gguf_adapter, mlx, peft_config, safetensors, tied};
use crate::adapter::Reach;
use crate::attach::{Attached, Origin, attach_part, candidates};
use crate::config::AdapterConfig;
use crate::module::{Host, ModuleMut};
use crate::parameter::ParameterMap;
use crate::target::Pattern;
use crate::{Error, Result};

/// Name of the settings file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the weights file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Values that are looked at at once.
const CHECKED: usize = 1 << 16;
const PREFIX: &str = "base_model.model.";
/// Prefix of tensors that belong to no module: those that all sites share.
const SHARED_PREFIX: &str = "base_model.";

/// Endings of names that PEFT has changed: (old, new).
const RENAMED: &[(&str, &str)] = &[(".bone_block", ".miss_block")];

/// Modules that PEFT puts between a module's path and the name of a tensor.
const WRAPPERS: [&str; 4] = [".modules_to_save.", ".base_layer.", ".token_adapter.", ".ln_tuning_layers."];

/// What an adapter folder says before it meets a model.
#[derive(Debug)]
pub struct AdapterFiles {
    /// The folder.
    pub path: PathBuf,
    /// Its settings.
    pub config: AdapterConfig,
    /// Its tensors by full name in the model's naming.
    pub tensors: BTreeMap<String, Tensor>,
    /// Copies of the base's own weights that some tools save beside the adapter, by the name of the weight; they must equal
    /// the base's.
    pub copies: BTreeMap<String, Tensor>,
    /// Architecture that llama.cpp's names in a GGUF file are for, until they are translated.
    pub gguf: Option<String>,
}

/// Counts of what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Tensors.
    pub tensors: usize,
    /// Bytes of the weights file.
    pub bytes: u64,
}

/// Reads the settings of an adapter folder.
///
/// # Errors
/// If the folder, its settings or their values are not valid.
pub fn read_config(folder: &Path) -> Result<AdapterConfig> {
    // What a killed save had committed is put in place first.
    atomic::recover_of(folder, Some("files"))?;
    let path = folder.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let json = serde_json::from_str(&text).map_err(|e| Error::format(&path, e.to_string()))?;
    peft_config::from_json(json).map_err(|e| match e {
        Error::Config { key, message } => Error::Config { key: format!("{}: {key}", path.display()), message },
        other => other,
    })
}

/// An adapter folder whose tensors are still in its file.
#[derive(Debug)]
pub(super) struct OpenFolder {
    folder: PathBuf,
    config: AdapterConfig,
    file: safetensors::TensorFile,
    /// Keys in the file by the model's names.
    tensors: BTreeMap<String, String>,
    /// The same of copies of the base's own weights.
    copies: BTreeMap<String, String>,
}

impl OpenFolder {
    /// Reads the settings and the header.
    ///
    /// # Errors
    /// If a file is missing, truncated or malformed, or a key is not of a known layout.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let mut config = read_config(folder)?;
        let path = folder.join(WEIGHTS_FILE);
        let file = safetensors::TensorFile::open(&path)?;
        base_mark::take(&path, &mut config, &|key| file.metadata().get(key).cloned())?;
        let (mut tensors, mut copies) = (BTreeMap::new(), BTreeMap::new());
        for (key, ..) in file.entries() {
            if let Some(path) = key.strip_prefix(PREFIX).and_then(|k| k.strip_suffix(".base_layer.weight")) {
                copies.insert(format!("{path}.weight"), key);
                continue;
            }
            let unnamed = || Error::format(&path, format!("tensor `{key}`: the name does not begin with `{PREFIX}`"));
            let name = name_of(&key, config.method.reach()).ok_or_else(unnamed)?;
            if tensors.insert(name.clone(), key).is_some() {
                return Err(Error::format(&path, format!("two tensors of the file are both `{name}`")));
            }
        }
        Ok(Self { folder: folder.to_owned(), config, file, tensors, copies })
    }

    /// The settings.
    pub(super) fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Names of all tensors, in the model's naming.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Names of the base's own weights that are there once more.
    pub(super) fn copies(&self) -> impl Iterator<Item = &str> {
        self.copies.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file.kind(self.tensors.get(name)?).ok().map(|(_, shape)| shape)
    }

    /// The tensors whose names are `wanted`.
    ///
    /// # Errors
    /// If one of them cannot be read, is of no float type, or holds what is no number.
    pub(super) fn read(&self, wanted: &dyn Fn(&str) -> bool) -> Result<AdapterFiles> {
        let path = self.file.path();
        let mut tensors = BTreeMap::new();
        // What all sites share belongs to every part.
        for (name, key) in self.tensors.iter().filter(|(name, _)| wanted(name) || !name.contains('.')) {
            let tensor = self.file.load(key, &Device::Cpu)?;
            if !tensor.dtype().is_float() {
                let dtype = tensor.dtype().as_str();
                return Err(Error::format(path, format!("tensor `{key}` has dtype {dtype}, expected a float type")));
            }
            check_finite(path, key, &tensor)?;
            tensors.insert(name.clone(), tensor);
        }
        let copies = self.copies.iter().filter(|(name, _)| wanted(name));
        let copies = copies.map(|(name, key)| Ok((name.clone(), self.file.load(key, &Device::Cpu)?)));
        let copies = copies.collect::<Result<_>>()?;
        let mut config = self.config.clone();
        config.method.settle(&tensors);
        Ok(AdapterFiles { path: self.folder.clone(), config, tensors, copies, gguf: None })
    }
}

/// Reads an adapter folder.
///
/// # Errors
/// If a file is missing, truncated or malformed, or a key is not of a known layout.
pub fn read(folder: &Path) -> Result<AdapterFiles> {
    OpenFolder::open(folder)?.read(&|_| true)
}

pub(super) fn check_finite(path: &Path, key: &str, tensor: &Tensor) -> Result<()> {
    let flat = tensor.flatten_all()?;
    let count = flat.elem_count();
    for start in (0..count).step_by(CHECKED) {
        let values = flat.narrow(0, start, CHECKED.min(count - start))?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::format(path, format!("tensor `{key}` holds NaN or infinity (value {})", start + i)));
        }
    }
    Ok(())
}

/// The model's own name of a tensor in a file.
pub(super) fn name_of(key: &str, reach: Reach<'_>) -> Option<String> {
    let wrapped = |name: &str| WRAPPERS.iter().fold(name.to_owned(), |name, wrapper| name.replace(wrapper, "."));
    if reach == Reach::Sequence {
        let prompt = (key == PROMPT_EMBEDDINGS).then(|| key.to_owned());
        return prompt.or_else(|| key.strip_prefix(SHARED_PREFIX).map(wrapped));
    }
    let Some(name) = key.strip_prefix(PREFIX) else {
        return key.strip_prefix(SHARED_PREFIX).filter(|name| !name.contains('.')).map(str::to_owned);
    };
    let name = wrapped(name);
    let name = match RENAMED.iter().find_map(|(old, new)| Some((name.strip_suffix(old)?, new))) {
        Some((head, new)) => format!("{head}{new}"),
        None => name,
    };
    Some(match name.strip_suffix(".lora_magnitude_vector.weight") {
        Some(head) => format!("{head}.lora_magnitude_vector"),
        None => name,
    })
}

/// The name in a file of the tensor that the model calls `name`, for a method of `reach` at `sites`.
fn key_of(name: &str, sites: &BTreeSet<&str>, reach: Reach<'_>) -> String {
    if reach == Reach::Sequence {
        return if name == PROMPT_EMBEDDINGS { name.to_owned() } else { format!("{SHARED_PREFIX}{name}") };
    }
    let Some((module, part)) = name.rsplit_once('.') else { return format!("{SHARED_PREFIX}{name}") };
    match (part, reach) {
        (_, Reach::Whole) if sites.contains(module) => format!("{PREFIX}{module}.ln_tuning_layers.{part}"),
        ("trainable_tokens_delta", Reach::Maps | Reach::Whole) => format!("{PREFIX}{module}.token_adapter.{part}"),
        ("bias", Reach::Maps) if sites.contains(module) => format!("{PREFIX}{module}.base_layer.{part}"),
        _ => format!("{PREFIX}{name}"),
    }
}

/// Paths of modules whose weights files keep transposed.
fn transposed(host: &mut dyn Host) -> Result<BTreeSet<String>> {
    let mut paths = BTreeSet::new();
    host.walk(&mut |module| {
        if let ModuleMut::Linear(linear) = module
            && linear.transposed_on_disk()
        {
            paths.insert(linear.path().to_owned());
        }
        Ok(())
    })?;
    Ok(paths)
}

fn is_transposed(name: &str, transposed: &BTreeSet<String>) -> bool {
    name.strip_suffix(".weight").is_some_and(|path| transposed.contains(path))
}

/// Builds the adapter of `files` for `host`; a base with another hash is refused unless `allow_base`.
///
/// # Errors
/// If the base differs, or tensors and places do not pair up one to one.
pub fn load(
    host: &mut dyn Host,
    files: AdapterFiles,
    allow_base: bool,
    dtype: DType,
    device: &Device,
) -> Result<Attached> {
    let files = gguf_adapter::resolve(host, files)?;
    let base = base_mark::check(host, &files.config, &files.path, allow_base)?;
    let attached = load_part(host, files, &|_| true, dtype, device)?;
    Ok(Attached { base, ..attached })
}

/// Builds what the adapter of `files` has at the modules whose paths are `wanted`; `files` hold the tensors of these modules alone,
/// and their base was checked.
///
/// # Errors
/// As [`load`].
pub(super) fn load_part(
    host: &mut dyn Host,
    mut files: AdapterFiles,
    wanted: &dyn Fn(&str) -> bool,
    dtype: DType,
    device: &Device,
) -> Result<Attached> {
    let turned = transposed(host)?;
    for (name, tensor) in &mut files.tensors {
        if is_transposed(name, &turned) {
            *tensor = tensor.t()?.contiguous()?;
        }
    }
    let named = [WEIGHTS_FILE, mlx::WEIGHTS_FILE].map(|name| files.path.join(name));
    let path = match files.path.is_dir() {
        true => named.iter().find(|p| p.is_file()).unwrap_or(&named[0]).clone(),
        false => files.path,
    };
    copies::check(host, &path, &files.copies, &turned)?;
    if files.config.tie_weights {
        tied::take(host, &path, &files.config, &mut files.tensors)?;
    }
    let origin = Origin::File { path: &path, tensors: files.tensors };
    attach_part(host, &files.config, origin, wanted, dtype, device)
}

/// The parameters as they are saved, with the settings that go with them: portable where the method would otherwise need
/// a changed base.
pub(super) fn portable(adapter: &Attached) -> Result<(AdapterConfig, ParameterMap)> {
    let mut config = adapter.config.clone();
    let Some((method, rank_factor, alpha_factor)) = config.method.portable() else {
        return Ok((config, adapter.parameters.clone()));
    };
    config.method = method;
    config.targets.rank_pattern.values_mut().for_each(|r| *r *= rank_factor);
    config.targets.alpha_pattern.values_mut().for_each(|a| *a *= alpha_factor);
    let mut map = ParameterMap::new();
    if let Some(parameters) = adapter.prompt.as_ref().map(|p| p.portable()).transpose()?.flatten() {
        // Tensors of the adapter that belong to a module stay beside them.
        let beside = |name: &str| adapter.dense.iter().any(|d| name == format!("{}.{}", d.path, d.part));
        let layers = |name: &str| adapter.layers.keys().any(|p| name.starts_with(&format!("{p}.")));
        for p in adapter.parameters.iter().filter(|p| beside(&p.name) || layers(&p.name)) {
            map.push_as(p.name.clone(), &p.tensor, p.trainable, p.role);
        }
        map.extend(parameters);
        return Ok((config, map));
    }
    let mut changed = BTreeSet::new();
    for (path, layer) in &adapter.layers {
        if let Some(parameters) = layer.portable()? {
            map.extend_under(path, parameters);
            changed.insert(path.as_str());
        }
    }
    for p in adapter.parameters.iter() {
        if !changed.iter().any(|path| p.name.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'))) {
            map.push_as(p.name.clone(), &p.tensor, p.trainable, p.role);
        }
    }
    Ok((config, map))
}

/// Replaces a word for modules of any model by the shortest list of endings that names the same modules, for tools that want a list.
fn listed_targets(host: &mut dyn Host, adapter: &Attached) -> Result<Pattern> {
    if !adapter.config.targets.target_modules.is_keyword() {
        return Ok(adapter.config.targets.target_modules.clone());
    }
    let sites: BTreeSet<&str> = adapter.placement.sites.iter().map(|s| s.path.as_str()).collect();
    let ending = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let endings: BTreeSet<String> = sites.iter().map(|path| ending(path)).collect();
    let same = candidates(host)?.iter().all(|c| sites.contains(c.path.as_str()) == endings.contains(&ending(&c.path)));
    let narrowed =
        adapter.config.targets.layers_to_transform.is_some() || adapter.config.targets.exclude_modules.is_some();
    Ok(Pattern::Endings(if same || narrowed {
        endings.into_iter().collect()
    } else {
        sites.into_iter().map(str::to_owned).collect()
    }))
}

/// Whether something of a token table or of the head beside it is trained.
fn trains_embedding(host: &mut dyn Host, adapter: &Attached) -> Result<bool> {
    let heads = host.head_paths();
    let mut found = !adapter.rows.is_empty();
    found |= host.tied_table().is_some() && adapter.dense.iter().any(|d| heads.contains(&d.path));
    host.walk(&mut |module| {
        if let ModuleMut::Embedding(table) = module {
            let path = table.path();
            found |= adapter.layers.contains_key(path) || adapter.dense.iter().any(|d| d.path == path);
        }
        Ok(())
    })?;
    Ok(found)
}

/// Writes the adapter into `folder` (created if absent; other files in it stay).
///
/// # Errors
/// If a file cannot be written; an earlier one is whole then.
pub fn save(host: &mut dyn Host, adapter: &Attached, folder: &Path) -> Result<Saved> {
    write(host, adapter, portable(adapter)?, folder)
}

/// Writes the first `rank` components of an adapter into `folder`, as [`save`] does.
///
/// # Errors
/// As [`save`]; if the adapter's products are not nested or have no such rank.
pub fn save_cut(host: &mut dyn Host, adapter: &Attached, rank: usize, folder: &Path) -> Result<Saved> {
    write(host, adapter, adapter.cut(rank)?, folder)
}

fn write(
    host: &mut dyn Host,
    adapter: &Attached,
    (mut config, parameters): (AdapterConfig, ParameterMap),
    folder: &Path,
) -> Result<Saved> {
    config.targets.target_modules = listed_targets(host, adapter)?;
    let mut metadata = base_mark::of(host)?;
    metadata.insert("format".to_owned(), "pt".to_owned());
    let turned = transposed(host)?;
    let sites: BTreeSet<&str> = adapter.placement.sites.iter().map(|s| s.path.as_str()).collect();
    let mut entries = Vec::with_capacity(parameters.len());
    for p in parameters.iter() {
        let tensor = p.tensor.detach();
        let tensor = if is_transposed(&p.name, &turned) { tensor.t()?.contiguous()? } else { tensor };
        entries.push(safetensors::Entry::of(key_of(&p.name, &sites, config.method.reach()), &tensor));
    }
    let repeated = if config.tie_weights { tied::repeated(host, &config, &parameters)? } else { Vec::new() };
    entries.extend(repeated.iter().map(|(name, t)| safetensors::Entry::of(format!("{PREFIX}{name}"), t)));
    let tensors = entries.len();
    let json = peft_config::to_json(&config, trains_embedding(host, adapter)?)?;
    let text =
        serde_json::to_string_pretty(&json).map_err(|e| Error::format(folder.join(CONFIG_FILE), e.to_string()))?;
    let mut bytes = 0;
    atomic::replace_files(folder, &[WEIGHTS_FILE, CONFIG_FILE], |temp| {
        bytes = safetensors::write(&temp.join(WEIGHTS_FILE), entries, &metadata)?;
        atomic::write(&temp.join(CONFIG_FILE), |out| writeln!(out, "{text}"))
    })?;
    Ok(Saved { tensors, bytes })
}
