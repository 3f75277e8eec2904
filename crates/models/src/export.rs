//! Writes a model as a Hugging Face folder, tensor by tensor: one matrix in memory at a time, shards of bounded size.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use espalier_adapters::formats::{atomic, safetensors};
use espalier_adapters::{Host, ModuleMut};
use serde_json::{Value, json};

use crate::claim::{MARK, claim};
use crate::config::HeadSpec;
use crate::transformer::Model;
use crate::{Error, Result};

/// How a model is written.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Dtype of the file; the model's own if None.
    pub dtype: Option<DType>,
    /// Bytes after which a new shard begins.
    pub shard_bytes: u64,
    /// Whether the output head must be written apart from the token table although the architecture ties them; it is anyway where
    /// a merge left a head of its own.
    pub untie: bool,
    /// Keys added to or changed in `config.json`.
    pub config: serde_json::Map<String, Value>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { dtype: None, shard_bytes: 5 << 30, untie: false, config: serde_json::Map::new() }
    }
}

/// Counts of what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Tensors.
    pub tensors: usize,
    /// Weight files.
    pub files: usize,
    /// Bytes of the weight files.
    pub bytes: u64,
}

/// Files beside the weights that belong to a model.
pub(crate) const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// Copies the tokenizer and templates of one model folder to another.
///
/// # Errors
/// If a file cannot be copied.
pub fn copy_companions(from: &Path, to: &Path) -> Result<usize> {
    let mut copied = 0;
    for name in COMPANIONS {
        let source = from.join(name);
        if source.is_file() && from != to {
            let bytes = std::fs::read(&source).map_err(|e| Error::io(&source, e))?;
            atomic::write(&to.join(name), |out| out.write_all(&bytes))?;
            copied += 1;
        }
    }
    Ok(copied)
}

impl Model {
    /// Writes the base weights, with what was merged into them, as a model folder. Adapters in the slots are not written.
    ///
    /// # Errors
    /// If `folder` holds anything but an earlier export or is the base itself, or a file cannot be written; an earlier folder is
    /// whole then.
    pub fn export(&mut self, folder: &Path, options: &ExportOptions) -> Result<Exported> {
        claim(folder, self.provenance.path())?;
        let mut written = Exported { tensors: 0, files: 0, bytes: 0 };
        atomic::replace_folder(folder, |temp| -> Result<()> {
            written = self.write(temp, options)?;
            Ok(())
        })?;
        Ok(written)
    }

    /// Writes what [`Self::export`] does into `folder`, which exists; for callers that replace a folder themselves.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&mut self, folder: &Path, options: &ExportOptions) -> Result<Exported> {
        let written = self.write_weights(folder, options)?;
        let config = self.config_json(options)?;
        atomic::write(&folder.join("config.json"), |out| writeln!(out, "{config}"))?;
        if let Some(from) = self.provenance.path().filter(|p| p.is_dir()) {
            copy_companions(from, folder)?;
        }
        Ok(written)
    }

    fn config_json(&self, options: &ExportOptions) -> Result<String> {
        let mut raw = self.config.raw.clone();
        if let Some(keys) = raw.as_object_mut() {
            let dtype = options.dtype.unwrap_or(self.dtype());
            let name = match dtype {
                DType::BF16 => "bfloat16",
                DType::F16 => "float16",
                _ => "float32",
            };
            for key in ["dtype", "torch_dtype"] {
                if key == "torch_dtype" || keys.contains_key(key) {
                    keys.insert(key.into(), name.into());
                }
            }
            keys.remove("quantization_config");
            if self.unties(options) {
                keys.insert("tie_word_embeddings".into(), false.into());
            }
            if let HeadSpec::Pooled { labels } | HeadSpec::Dense { labels } = self.config.head {
                let known = keys.get("id2label").and_then(Value::as_object).map(serde_json::Map::len);
                if known != Some(labels) {
                    let names: Vec<String> = (0..labels).map(|i| format!("LABEL_{i}")).collect();
                    let to: serde_json::Map<_, _> =
                        names.iter().enumerate().map(|(i, n)| (i.to_string(), json!(n))).collect();
                    let back: serde_json::Map<_, _> =
                        names.iter().enumerate().map(|(i, n)| (n.clone(), json!(i))).collect();
                    keys.insert("id2label".into(), to.into());
                    keys.insert("label2id".into(), back.into());
                }
                let class = if self.config.family == "bert" { "Bert" } else { "Roberta" };
                keys.insert("architectures".into(), json!([format!("{class}ForSequenceClassification")]));
            }
            keys.extend(options.config.clone());
        }
        serde_json::to_string_pretty(&raw).map_err(|e| Error::Input(e.to_string()))
    }

    /// Whether a tied architecture is written with a head of its own.
    fn unties(&self, options: &ExportOptions) -> bool {
        self.config.tied && (options.untie || self.embed.head().kept().is_some())
    }

    fn write_weights(&mut self, folder: &Path, options: &ExportOptions) -> Result<Exported> {
        let entries = self.entries(options)?;
        let size = |e: &safetensors::Entry<'_>| (e.shape.iter().product::<usize>() * e.dtype.size_in_bytes()) as u64;
        let mut shards: Vec<Vec<safetensors::Entry<'static>>> = vec![Vec::new()];
        let mut filled = 0u64;
        for entry in entries {
            let bytes = size(&entry);
            if filled > 0 && filled + bytes > options.shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push(entry);
            }
        }
        let files = shards.len();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), (MARK.to_owned(), "model".to_owned())]);
        let mut written = Exported { tensors: 0, files, bytes: 0 };
        let mut map = serde_json::Map::new();
        let mut total = 0u64;
        for (i, shard) in shards.into_iter().enumerate() {
            let name = if files == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{files:05}.safetensors", i + 1)
            };
            for entry in &shard {
                map.insert(entry.name.clone(), name.clone().into());
                total += size(entry);
            }
            written.tensors += shard.len();
            written.bytes += safetensors::write(&folder.join(&name), shard, &metadata)?;
        }
        if files > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            atomic::write(&folder.join("model.safetensors.index.json"), |out| writeln!(out, "{index:#}"))?;
        }
        Ok(written)
    }

    /// All tensors of the file in model order; a quantised matrix is made dense only when it is written.
    fn entries(&mut self, options: &ExportOptions) -> Result<Vec<safetensors::Entry<'static>>> {
        let dtype = options.dtype.unwrap_or(self.dtype());
        let own_head = self.unties(options).then(|| self.embed.head().kept().unwrap_or(self.embed.base()).clone());
        let mut entries = Vec::new();
        let small = |name: String, tensor: &Tensor| {
            let tensor = tensor.clone();
            let shape = tensor.dims().to_vec();
            safetensors::Entry { name, dtype, shape, values: Box::new(move || Ok(tensor)) }
        };
        self.walk(&mut |module| {
            let path = module.path().to_owned();
            match module {
                ModuleMut::Linear(linear) => {
                    let base = linear.base().clone();
                    let turned = linear.transposed_on_disk();
                    let (d_out, d_in) = (base.d_out(), base.d_in());
                    let shape = if turned { vec![d_in, d_out] } else { vec![d_out, d_in] };
                    let values = Box::new(move || {
                        let weight = base.dequantize(dtype)?;
                        Ok(if turned { weight.t()?.contiguous()? } else { weight })
                    });
                    entries.push(safetensors::Entry { name: format!("{path}.weight"), dtype, shape, values });
                    if let Some(bias) = linear.bias() {
                        entries.push(small(format!("{path}.bias"), bias.frozen()));
                    }
                }
                ModuleMut::Norm(norm) => {
                    entries.push(small(format!("{path}.weight"), norm.weight().frozen()));
                    if let Some(bias) = norm.bias() {
                        entries.push(small(format!("{path}.bias"), bias.frozen()));
                    }
                }
                ModuleMut::Embedding(embedding) => {
                    entries.push(small(format!("{path}.weight"), embedding.weight().frozen()));
                }
            }
            Ok(())
        })?;
        if let Some(head) = own_head {
            let shape = vec![head.d_out(), head.d_in()];
            let name = format!("{}.weight", self.config.names.head);
            let values = Box::new(move || Ok(head.dequantize(dtype)?));
            entries.push(safetensors::Entry { name, dtype, shape, values });
        }
        Ok(entries)
    }
}
