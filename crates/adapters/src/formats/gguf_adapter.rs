//! An adapter of llama.cpp: one GGUF file with two factors for each tensor of the base, under llama.cpp's names for them.
//!
//! Equation: y = W x + s B A x, s = alpha / r with one alpha for all; alpha 0 or absent means s = 1
//! Shapes:   `T.lora_a` [r, d_in], `T.lora_b` [d_out, r]; of the token table `lora_a` is [vocabulary, r]
//! Source:   llama.cpp, `convert_lora_to_gguf.py` and `llama-adapter.cpp`
//!
//! What the tensors of a base are called there, and whose rows are stored interleaved, the host says ([`Host::gguf_name`]).

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::folder::{AdapterFiles, Saved, check_finite};
use super::{atomic, base_mark, gguf, products};
use crate::attach::Attached;
use crate::config::AdapterConfig;
use crate::module::{Host, ModuleMut};
use crate::parametrisation::MethodConfig;
use crate::parametrisation::lora::Lora;
use crate::target::{Pattern, TargetSpec};
use crate::{Error, Result};

const ALPHA: &str = "adapter.lora.alpha";
const TABLE: &str = "token_embd.weight";

/// What llama.cpp calls the weight of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufName {
    /// `general.architecture` of the model.
    pub architecture: String,
    /// Name of the weight.
    pub tensor: String,
    /// Heads whose rows are stored pairwise interleaved, where they are.
    pub interleaved: Option<usize>,
}

/// Whether the file at `path` is a GGUF file that says it is an adapter.
pub(super) fn is_adapter(path: &Path) -> bool {
    let Ok((content, _)) = gguf::open(path) else { return false };
    content.metadata.get("general.type").and_then(|v| v.to_string().ok()).is_some_and(|t| t == "adapter")
}

/// Reads the file; its modules still have llama.cpp's names, which [`resolve`] replaces.
///
/// # Errors
/// If the file is malformed, is no low-rank adapter, or holds what is not understood.
pub(super) fn read(path: &Path) -> Result<AdapterFiles> {
    let (content, mut reader) = gguf::open(path)?;
    let wrong = |message: String| Error::format(path, message);
    let text = |key: &str| content.metadata.get(key).and_then(|v| v.to_string().ok()).cloned();
    if text("general.type").as_deref() != Some("adapter") {
        return Err(wrong("`general.type` is not `adapter`: this is no adapter of llama.cpp".into()));
    }
    let architecture = text("general.architecture").ok_or_else(|| wrong("no `general.architecture`".into()))?;
    match text("adapter.type") {
        Some(kind) if kind == "lora" => {}
        other => return Err(wrong(format!("`adapter.type` is {other:?}, expected `lora`"))),
    }
    let known = |key: &String| key == "adapter.type" || key == ALPHA || !key.starts_with("adapter.");
    if let Some(key) = content.metadata.keys().find(|key| !known(key)) {
        return Err(wrong(format!("`{key}` is not supported, and ignoring it would change the results")));
    }
    let alpha = match content.metadata.get(ALPHA) {
        None => 0.0,
        Some(value) => f64::from(value.to_f32().map_err(|_| wrong(format!("`{ALPHA}` is no 32-bit float")))?),
    };
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let (mut tensors, mut ranks) = (BTreeMap::new(), BTreeMap::new());
    for name in names {
        let (module, part) = name.rsplit_once('.').unwrap_or(("", name));
        let table = module == TABLE;
        let own = match (part, table) {
            ("lora_a", false) => "lora_A.weight",
            ("lora_b", false) => "lora_B.weight",
            ("lora_a", true) => "lora_embedding_A",
            ("lora_b", true) => "lora_embedding_B",
            _ => return Err(wrong(format!("tensor `{name}` is no factor of an adapter"))),
        };
        let tensor = content.tensor(&mut reader, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        check_finite(path, name, &tensor)?;
        let (rows, _) = tensor.dims2().map_err(|_| wrong(format!("tensor `{name}`: {:?}", tensor.dims())))?;
        let tensor = if table && part == "lora_a" { tensor.t()?.contiguous()? } else { tensor };
        if part == "lora_a" {
            ranks.insert(module.to_owned(), if table { tensor.dim(0)? } else { rows });
        }
        tensors.insert(format!("{module}.{own}"), tensor);
    }
    let r = ranks.values().copied().max().unwrap_or(0);
    let key = |module: &String| regex::escape(module);
    let targets = TargetSpec {
        target_modules: Pattern::Endings(ranks.keys().cloned().collect()),
        rank_pattern: ranks.iter().filter(|(_, rank)| **rank != r).map(|(m, rank)| (key(m), *rank)).collect(),
        // Without an alpha the factor is 1.
        alpha_pattern: match alpha == 0.0 {
            true => ranks.iter().filter(|(_, rank)| **rank != r).map(|(m, rank)| (key(m), *rank as f64)).collect(),
            false => BTreeMap::new(),
        },
        ..TargetSpec::default()
    };
    let method = MethodConfig::Lora(Lora { r, alpha: if alpha == 0.0 { r as f64 } else { alpha }, ..Lora::default() });
    let mut config = AdapterConfig { targets, tie_weights: false, ..AdapterConfig::new(method) };
    base_mark::take(path, &mut config, &text)?;
    let gguf = Some(architecture);
    Ok(AdapterFiles { path: path.to_owned(), config, tensors, copies: BTreeMap::new(), gguf })
}

/// Rows of llama.cpp's order in that of the model (`back`), or the reverse: (h, j, i) there is (h, i, j) here, i in 0..2.
fn reordered(b: &Tensor, heads: usize, back: bool) -> Result<Tensor> {
    let (rows, r) = b.dims2()?;
    if heads == 0 || rows % (2 * heads) != 0 {
        return Err(Error::config("rows", format!("{rows} rows are no {heads} heads of an even width")));
    }
    let half = rows / heads / 2;
    let shape = if back { (heads, half, 2, r) } else { (heads, 2, half, r) };
    Ok(b.reshape(shape)?.transpose(1, 2)?.contiguous()?.reshape((rows, r))?)
}

/// Gives the modules of `files` the names that `host` has for them, and their rows its order.
///
/// # Errors
/// If the file is for another architecture, or a tensor of it belongs to no module of the host.
pub(super) fn resolve(host: &mut dyn Host, files: AdapterFiles) -> Result<AdapterFiles> {
    let Some(architecture) = &files.gguf else { return Ok(files) };
    let mut places: BTreeMap<String, (String, Option<usize>)> = BTreeMap::new();
    let mut own = None;
    for path in paths(host)? {
        if let Some(name) = host.gguf_name(&path) {
            own = Some(name.architecture);
            places.insert(name.tensor, (path, name.interleaved));
        }
    }
    if own.as_ref() != Some(architecture) {
        let own = own.unwrap_or_else(|| "one that llama.cpp's names are not known for".into());
        let what = format!("the adapter is for the architecture `{architecture}`, the model is `{own}`");
        return Err(Error::format(&files.path, what));
    }
    let place = |module: &str| {
        let what = || Error::format(&files.path, format!("`{module}` is no tensor of the model"));
        places.get(module).ok_or_else(what)
    };
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &files.tensors {
        let module = super::outline::module_of(name);
        let (path, interleaved) = place(module)?;
        let part = &name[module.len()..];
        let tensor = match interleaved.filter(|_| part == ".lora_B.weight") {
            Some(heads) => reordered(tensor, heads, true)?,
            None => tensor.clone(),
        };
        tensors.insert(format!("{path}{part}"), tensor);
    }
    let mut config = files.config.clone();
    if let Pattern::Endings(modules) = &mut config.targets.target_modules {
        for module in modules.iter_mut() {
            *module = place(module)?.0.clone();
        }
    }
    let renamed =
        |pattern: &str| places.iter().find(|(m, _)| regex::escape(m) == pattern).map(|(_, (p, _))| regex::escape(p));
    let targets = &mut config.targets;
    targets.rank_pattern = targets.rank_pattern.iter().filter_map(|(k, v)| Some((renamed(k)?, *v))).collect();
    targets.alpha_pattern = targets.alpha_pattern.iter().filter_map(|(k, v)| Some((renamed(k)?, *v))).collect();
    Ok(AdapterFiles { config, tensors, gguf: None, ..files })
}

/// Paths of the maps and tables of a model.
fn paths(host: &mut dyn Host) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    host.walk(&mut |module| {
        if !matches!(module, ModuleMut::Norm(_)) {
            paths.push(module.path().to_owned());
        }
        Ok(())
    })?;
    Ok(paths)
}

/// Writes the adapter as a GGUF file for llama.cpp.
///
/// # Errors
/// If a part of it has no place there, a module has no name there, or the file cannot be written.
pub(super) fn save(host: &mut dyn Host, adapter: &Attached, path: &Path) -> Result<Saved> {
    let products = products::of(host, adapter, "adapter of llama.cpp")?;
    let Some(first) = products.first() else {
        return Err(Error::unsupported("an adapter without modules", "there is nothing to write"));
    };
    // One alpha for all: what is left of a module's factor goes into its B.
    let alpha = first.scale * first.a.dim(0)? as f64;
    let tied = host.tied_table();
    let (mut architecture, mut tensors) = (String::new(), Vec::new());
    for product in &products {
        let refuse = |why: &str| Err(Error::unsupported(format!("{} in an adapter of llama.cpp", product.path), why));
        if product.magnitude.is_some() {
            return refuse("it has no magnitudes; merge the adapter, or train it without them");
        }
        if tied.as_ref() == Some(&product.path) {
            return refuse(
                "the output head has the table's name there, so the change of the one cannot be told from the other's",
            );
        }
        let Some(name) = host.gguf_name(&product.path) else {
            return refuse("llama.cpp's name of this module is not known here");
        };
        let rank = product.a.dim(0)?;
        let (a, b) = products::widened(product, rank, alpha / rank as f64)?;
        let a = if product.lookup { a.t()?.contiguous()? } else { a };
        let b = match name.interleaved {
            Some(heads) => reordered(&b, heads, false)?,
            None => b,
        };
        for (part, t) in [("lora_a", &a), ("lora_b", &b)] {
            tensors.push((format!("{}.{part}", name.tensor), QTensor::quantize(t, GgmlDType::F32)?));
        }
        architecture = name.architecture;
    }
    let metadata = [
        ("general.type", Value::String("adapter".into())),
        ("general.architecture", Value::String(architecture)),
        ("general.name", Value::String(adapter.config.base.clone().unwrap_or_default())),
        ("adapter.type", Value::String("lora".into())),
        (ALPHA, Value::F32(alpha as f32)),
    ];
    let marks: Vec<(String, Value)> = base_mark::of(host)?.into_iter().map(|(k, v)| (k, Value::String(v))).collect();
    let mut metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    metadata.extend(marks.iter().map(|(key, value)| (key.as_str(), value)));
    let listed: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let mut file = std::io::Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &listed)?;
    let bytes = file.into_inner();
    atomic::write(path, |out| out.write_all(&bytes))?;
    Ok(Saved { tensors: tensors.len(), bytes: bytes.len() as u64 })
}
