//! An adapter folder: `adapter_config.json` and `adapter_model.safetensors`, in PEFT's layout.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::peft_config::PROMPT_EMBEDDINGS;
use super::{atomic, copies, gguf_adapter, mlx, peft_config, safetensors, tied};
use crate::adapter::Reach;
use crate::attach::{Attached, BaseCheck, Origin, attach, candidates};
use crate::config::AdapterConfig;
use crate::module::{Host, ModuleMut};
use crate::parameter::ParameterMap;
use crate::target::Pattern;
use crate::{Error, Result};

/// Name of the settings file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the weights file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Metadata key of the base's content hash in the weights file.
pub const BASE_HASH_KEY: &str = "espalier.base_hash";

const PREFIX: &str = "base_model.model.";
/// Prefix of tensors that belong to no module: those that all sites share.
const SHARED_PREFIX: &str = "base_model.";

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

/// Reads an adapter folder.
///
/// # Errors
/// If a file is missing, truncated or malformed, or a key is not of a known layout.
pub fn read(folder: &Path) -> Result<AdapterFiles> {
    let mut config = read_config(folder)?;
    let path = folder.join(WEIGHTS_FILE);
    let file = safetensors::MappedFile::open(&path)?;
    config.base_hash = file.metadata().get(BASE_HASH_KEY).cloned();
    let mut tensors = BTreeMap::new();
    let mut copies = BTreeMap::new();
    for (key, tensor) in file.load_all(&Device::Cpu)? {
        if let Some(path) = key.strip_prefix(PREFIX).and_then(|k| k.strip_suffix(".base_layer.weight")) {
            copies.insert(format!("{path}.weight"), tensor);
            continue;
        }
        let name = name_of(&key, config.method.reach())
            .ok_or_else(|| Error::format(&path, format!("tensor `{key}`: the name does not begin with `{PREFIX}`")))?;
        if !tensor.dtype().is_float() {
            let dtype = tensor.dtype().as_str();
            return Err(Error::format(&path, format!("tensor `{key}` has dtype {dtype}, expected a float type")));
        }
        check_finite(&path, &key, &tensor)?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(Error::format(&path, format!("two tensors of the file are both `{name}`")));
        }
    }
    Ok(AdapterFiles { path: folder.to_owned(), config, tensors, copies, gguf: None })
}

pub(super) fn check_finite(path: &Path, key: &str, tensor: &Tensor) -> Result<()> {
    let sum = tensor.to_dtype(DType::F32)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
    match sum.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(Error::format(path, format!("tensor `{key}` holds NaN or infinity (value {i})"))),
        None => Ok(()),
    }
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
    let mut files = gguf_adapter::resolve(host, files)?;
    let base = match &files.config.base_hash {
        None => BaseCheck::NoHash,
        Some(expected) => {
            let found = host.base_hash()?;
            match (*expected == found, allow_base) {
                (true, _) => BaseCheck::Same,
                (false, true) => BaseCheck::Forced,
                (false, false) => {
                    return Err(Error::WrongBase { path: files.path, expected: expected.clone(), found });
                }
            }
        }
    };
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
    let attached = attach(host, &files.config, Origin::File { path: &path, tensors: files.tensors }, dtype, device)?;
    Ok(Attached { base, ..attached })
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
    let (mut config, parameters) = portable(adapter)?;
    config.targets.target_modules = listed_targets(host, adapter)?;
    let hash = host.base_hash()?;
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
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), (BASE_HASH_KEY.to_owned(), hash)]);
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
