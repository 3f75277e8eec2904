//! Writes a model as a Hugging Face folder, with everything that acts on its weights written in: from memory, or from the files
//! of its base without loading it.

use std::path::Path;

use candle_core::DType;
use espalier_adapters::formats::atomic;
use espalier_adapters::formats::piecewise::Piecewise;
use serde_json::{Value, json};

use crate::claim::claim;
use crate::config::HeadSpec;
use crate::streamed::Streamed;
use crate::transformer::Model;
use crate::weight_files::Writer;
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
    /// Whether the output head of a tied architecture was written apart from the token table.
    pub unties: bool,
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
    /// Writes the weights, with what was merged into them and what acts in the slots, as a model folder.
    ///
    /// # Errors
    /// If `folder` holds anything but an earlier export or is the base itself, or a file cannot be written; an earlier folder is
    /// whole then.
    pub fn export(&mut self, folder: &Path, options: &ExportOptions) -> Result<Exported> {
        claim(folder, self.provenance.path())?;
        let mut written = Exported { tensors: 0, files: 0, bytes: 0, unties: false };
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
        let written = Writer { model: self, store: None, adapters: None }.write(folder, options)?;
        self.write_beside(folder, options, written.unties)?;
        Ok(written)
    }

    /// Settings, tokenizer and templates.
    fn write_beside(&self, folder: &Path, options: &ExportOptions, unties: bool) -> Result<()> {
        let config = self.config_json(options, unties)?;
        atomic::write(&folder.join("config.json"), |out| writeln!(out, "{config}"))?;
        if let Some(from) = self.provenance.path().filter(|p| p.is_dir()) {
            copy_companions(from, folder)?;
        }
        Ok(())
    }

    fn config_json(&self, options: &ExportOptions, unties: bool) -> Result<String> {
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
            if unties {
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
}

impl Streamed {
    /// Writes the base with what `adapters` do to it into `folder`, which exists, from file to file: no more than a matrix is in
    /// memory at once.
    ///
    /// # Errors
    /// If a weight cannot be read, a change has no place in the weights, or a file cannot be written.
    pub fn write(&mut self, folder: &Path, options: &ExportOptions, adapters: &Piecewise) -> Result<Exported> {
        let Self { model, store } = self;
        let written = Writer { model, store: Some(store), adapters: Some(adapters) }.write(folder, options)?;
        self.model.write_beside(folder, options, written.unties)?;
        Ok(written)
    }
}
