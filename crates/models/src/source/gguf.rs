//! A GGUF file as a frozen base: block-quantised matrices stay as they are, everything else becomes dense.
//!
//! Source: the GGUF specification of llama.cpp; its converter's changes are undone here: rows of q and k of the `llama`
//! architecture are stored pairwise interleaved, norm gains of Gemma have 1 added.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use espalier_adapters::formats::gguf as header;
use espalier_adapters::formats::hash::of_parts;
use espalier_adapters::{Error as AdapterError, FrozenWeight};

use super::gguf_names::{ARCHITECTURES, config, is_interleaved, tensor_name};
use super::{LoadOptions, WeightSource};
use crate::config::rope::RopeScaling;
use crate::config::{ModelConfig, Positions};
use crate::{Error, Result};

/// Hands out the tensors of a GGUF file.
#[derive(Debug)]
pub(crate) struct GgufSource {
    path: PathBuf,
    content: Content,
    reader: BufReader<File>,
    family: String,
    heads: usize,
    kv_heads: usize,
    interleaved: bool,
    taken: BTreeSet<String>,
    missing: Vec<String>,
}

fn read(path: &Path) -> Result<(Content, BufReader<File>)> {
    header::open(path).map_err(|e| match e {
        AdapterError::Format { path, message } => Error::NotAModel { path, message },
        AdapterError::Io { path, source } => Error::Io { path, source },
        other => other.into(),
    })
}

/// One stored tensor, with the file's name in its error.
fn stored(
    path: &Path,
    content: &Content,
    reader: &mut BufReader<File>,
    name: &str,
    device: &Device,
) -> Result<QTensor> {
    content.tensor(reader, name, device).map_err(|e| Error::NotAModel {
        path: path.to_owned(),
        message: format!("tensor `{name}` cannot be read; is the file truncated? {e}"),
    })
}

/// Opens a GGUF file: its architecture and its tensors.
pub(crate) fn open(path: &Path) -> Result<(ModelConfig, GgufSource)> {
    let (content, mut reader) = read(path)?;
    let wrong = |message: String| Error::NotAModel { path: path.to_owned(), message };
    let arch = content
        .metadata
        .get("general.architecture")
        .and_then(|v| v.to_string().ok().cloned())
        .ok_or_else(|| wrong("no `general.architecture` in the metadata".into()))?;
    let family = ARCHITECTURES.iter().find(|(name, _)| *name == arch).map(|(_, family)| *family).ok_or_else(|| {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        wrong(format!("architecture `{arch}` is not supported (supported: {})", known.join(", ")))
    })?;
    let mut json = config(&arch, family, &content.metadata);
    let embed = content.tensor_infos.get("token_embd.weight").ok_or_else(|| wrong("no `token_embd.weight`".into()))?;
    let tied = !content.tensor_infos.contains_key("output.weight");
    let [vocab, _] = *embed.shape.dims() else {
        return Err(wrong(format!("`token_embd.weight` has shape {:?}, expected a matrix", embed.shape.dims())));
    };
    // Every block has tensors of its own.
    let blocks = json.get("num_hidden_layers").and_then(serde_json::Value::as_u64).unwrap_or(0);
    if blocks > content.tensor_infos.len() as u64 {
        let n = content.tensor_infos.len();
        return Err(wrong(format!("`{arch}.block_count` is {blocks}, but the file has {n} tensors")));
    }
    json.insert("vocab_size".into(), vocab.into());
    json.insert("tie_word_embeddings".into(), tied.into());
    if content.tensor_infos.contains_key("blk.0.attn_output.bias") {
        json.insert("attention_bias".into(), true.into());
    }
    let mut taken = BTreeSet::new();
    let mut config = ModelConfig::from_json(path, json.into())?;
    let rotated = if let Positions::Rope(rope) = &config.positions { rope.dim / 2 } else { 0 };
    let mut factors = |name: &str| -> Result<Option<Vec<f64>>> {
        let Some(info) = content.tensor_infos.get(name) else { return Ok(None) };
        if info.shape.dims() != [rotated] {
            let found = info.shape.dims().to_vec();
            return Err(Error::Shape { path: path.to_owned(), tensor: name.into(), expected: vec![rotated], found });
        }
        taken.insert(name.to_owned());
        let values = stored(path, &content, &mut reader, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        Ok(Some(values.to_vec1::<f32>()?.into_iter().map(f64::from).collect()))
    };
    let both = factors("rope_freqs.weight")?;
    let (short, long) = (factors("rope_factors_short.weight")?, factors("rope_factors_long.weight")?);
    if let Positions::Rope(rope) = &mut config.positions {
        let original = config.raw.get("original_max_position_embeddings").and_then(serde_json::Value::as_u64);
        let original = original.map_or(config.max_positions, |n| n as usize);
        if let Some(short) = both {
            rope.scaling = RopeScaling::LongRope { long: short.clone(), short, attention: 1.0, original };
        } else if let (Some(short), Some(long)) = (short, long) {
            let stretch = config.max_positions as f64 / original as f64;
            let attention = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / (original as f64).ln()).sqrt() };
            rope.scaling = RopeScaling::LongRope { short, long, attention, original };
        }
    }
    let source = GgufSource {
        path: path.to_owned(),
        content,
        reader,
        family: family.to_owned(),
        heads: config.heads,
        kv_heads: config.kv_heads,
        interleaved: is_interleaved(&arch),
        taken,
        missing: Vec::new(),
    };
    Ok((config, source))
}

/// Content hash of all tensors, as stored.
pub(crate) fn hash(path: &Path) -> Result<String> {
    let (content, mut reader) = read(path)?;
    let mut names: Vec<_> = content.tensor_infos.keys().collect();
    names.sort();
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for name in names {
        let tensor = stored(path, &content, &mut reader, name, &Device::Cpu)?;
        parts.push(format!("{name}{:?}{:?}", tensor.dtype(), tensor.shape().dims()).into_bytes());
        parts.push(of_parts(std::iter::once(tensor.data()?.as_ref())).into_bytes());
    }
    Ok(of_parts(parts.iter().map(Vec::as_slice)))
}

impl GgufSource {
    /// The stored tensor, with its rows in transformers' order.
    fn load(&mut self, name: &str, shape: &[usize], device: &Device) -> Result<Option<QTensor>> {
        if !self.claim(name, shape)? {
            return Ok(None);
        }
        let Some(own) = tensor_name(&self.family, name) else { return Ok(None) };
        let heads = match name {
            _ if !self.interleaved => None,
            _ if name.contains(".self_attn.q_proj.") => Some(self.heads),
            _ if name.contains(".self_attn.k_proj.") => Some(self.kv_heads),
            _ => None,
        };
        // Rows are put in order on the CPU; the result goes to the device.
        let place = if heads.is_some() { &Device::Cpu } else { device };
        let tensor = stored(&self.path, &self.content, &mut self.reader, &own, place)?;
        match heads {
            Some(heads) if shape[0].is_multiple_of(2 * heads.max(1)) => Ok(Some(deinterleave(&tensor, heads, device)?)),
            Some(heads) => Err(Error::NotAModel {
                path: self.path.clone(),
                message: format!("`{name}`: {} rows are no {heads} heads of an even width", shape[0]),
            }),
            None => Ok(Some(tensor)),
        }
    }
}

/// Row (h, j, i) of the file is row (h, i, j) of transformers, for i in 0..2 and j in 0..half a head.
fn deinterleave(tensor: &QTensor, heads: usize, device: &Device) -> Result<QTensor> {
    let rows = tensor.shape().dims()[0];
    let bytes = tensor.data()?;
    let row = bytes.len() / rows.max(1);
    let half = rows / heads.max(1) / 2;
    let mut out = Vec::with_capacity(bytes.len());
    for h in 0..heads {
        for i in 0..2 {
            for j in 0..half {
                let at = (h * 2 * half + 2 * j + i) * row;
                out.extend_from_slice(&bytes[at..at + row]);
            }
        }
    }
    let storage = QStorage::from_data(Cow::Owned(out), device, tensor.dtype())?;
    Ok(QTensor::new(storage, tensor.shape().dims())?)
}

impl WeightSource for GgufSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn has(&self, name: &str) -> bool {
        tensor_name(&self.family, name).is_some_and(|n| self.content.tensor_infos.contains_key(&n))
    }

    fn claim(&mut self, name: &str, shape: &[usize]) -> Result<bool> {
        let own = tensor_name(&self.family, name);
        let Some((own, info)) = own.and_then(|own| self.content.tensor_infos.get_key_value(&own)) else {
            self.missing.push(name.to_owned());
            return Ok(false);
        };
        if info.shape.dims() != shape {
            return Err(Error::Shape {
                path: self.path.clone(),
                tensor: own.clone(),
                expected: shape.to_vec(),
                found: info.shape.dims().to_vec(),
            });
        }
        self.taken.insert(own.clone());
        Ok(true)
    }

    fn dense(&mut self, name: &str, shape: &[usize], options: &LoadOptions) -> Result<Tensor> {
        let Some(tensor) = self.load(name, shape, &options.device)? else {
            return Ok(Tensor::zeros(shape, options.dtype, &options.device)?);
        };
        let values = tensor.dequantize(&options.device)?;
        let values = if self.family == "gemma2" && name.ends_with("norm.weight") { (values - 1.0)? } else { values };
        Ok(values.to_dtype(options.dtype)?)
    }

    fn matrix(
        &mut self,
        name: &str,
        d_out: usize,
        d_in: usize,
        _transposed: bool,
        options: &LoadOptions,
    ) -> Result<FrozenWeight> {
        let Some(tensor) = self.load(name, &[d_out, d_in], &options.device)? else {
            return Ok(FrozenWeight::dense(Tensor::zeros((d_out, d_in), options.dtype, &options.device)?)?);
        };
        match (tensor.dtype(), options.quantization) {
            (_, Some(quantization)) => quantization.apply(&tensor.dequantize(&options.device)?),
            (GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16, None) => {
                Ok(FrozenWeight::dense(tensor.dequantize(&options.device)?.to_dtype(options.dtype)?)?)
            }
            _ => Ok(FrozenWeight::gguf(Arc::new(tensor))?),
        }
    }

    fn missing(&self) -> &[String] {
        &self.missing
    }

    fn unused(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.content.tensor_infos.keys().filter(|n| !self.taken.contains(*n)).cloned().collect();
        names.sort();
        names
    }
}
