//! A Hugging Face model folder: `config.json` and one or several safetensors files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_adapters::FrozenWeight;
use espalier_adapters::formats::{hash, safetensors::TensorFile};
use serde_json::Value;

use super::{LoadOptions, WeightSource};
use crate::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The weight files of a folder.
#[derive(Debug)]
pub struct WeightFiles {
    folder: PathBuf,
    files: Vec<TensorFile>,
    place: BTreeMap<String, usize>,
}

impl WeightFiles {
    /// Opens `model.safetensors`, the shards of its index, or any single safetensors file of the folder.
    ///
    /// # Errors
    /// If there is none, one is truncated, or the index and the shards disagree.
    pub fn open(folder: &Path) -> Result<Arc<Self>> {
        let names = file_names(folder)?;
        let mut files = Vec::with_capacity(names.len());
        let mut place = BTreeMap::new();
        for name in names {
            let file = TensorFile::open(&folder.join(&name))?;
            for (tensor, ..) in file.entries() {
                if place.insert(tensor.clone(), files.len()).is_some() {
                    return Err(Error::NotAModel {
                        path: folder.to_owned(),
                        message: format!("tensor `{tensor}` is in two files"),
                    });
                }
            }
            files.push(file);
        }
        Ok(Arc::new(Self { folder: folder.to_owned(), files, place }))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, name: &str) -> Option<&TensorFile> {
        self.place.get(name).map(|i| &self.files[*i])
    }

    /// Content hash of all tensors.
    ///
    /// # Errors
    /// If a file is malformed.
    pub fn hash(&self) -> Result<String> {
        Ok(hash::of_files(&self.files)?)
    }
}

fn file_names(folder: &Path) -> Result<Vec<String>> {
    let index = folder.join(INDEX);
    if index.is_file() {
        let text = std::fs::read_to_string(&index).map_err(|e| Error::io(&index, e))?;
        let wrong = |message: String| Error::NotAModel { path: index.clone(), message };
        let json: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| wrong("no `weight_map`".into()))?;
        let mut names = BTreeSet::new();
        for value in map.values() {
            let name = value.as_str().filter(|n| !n.contains(['/', '\\']) && *n != "..");
            names.insert(name.ok_or_else(|| wrong(format!("{value} is not a file name of this folder")))?.to_owned());
        }
        return Ok(names.into_iter().collect());
    }
    if folder.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.into()]);
    }
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut present: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    present.sort();
    let weights: Vec<String> =
        present.iter().filter(|n| n.ends_with(".safetensors") && !n.starts_with("adapter_")).cloned().collect();
    if weights.len() == 1 {
        return Ok(weights);
    }
    present.truncate(20);
    Err(Error::NotAModel {
        path: folder.to_owned(),
        message: format!("neither {SINGLE} nor {INDEX} is there; the folder holds: {}", present.join(", ")),
    })
}

/// Hands out the tensors of a folder.
#[derive(Debug)]
pub(crate) struct FolderSource {
    pub(crate) files: Arc<WeightFiles>,
    prefix: &'static str,
    taken: BTreeSet<String>,
    missing: Vec<String>,
}

impl FolderSource {
    /// `prefix` is what some files leave out (`model.`).
    pub(crate) fn new(files: Arc<WeightFiles>, prefix: &'static str) -> Self {
        Self { files, prefix, taken: BTreeSet::new(), missing: Vec::new() }
    }

    /// The file's own name of a tensor: as asked, or without the base prefix, or with TensorFlow-era norm names.
    fn resolve(&self, name: &str) -> Option<String> {
        let bare = name.strip_prefix(self.prefix).and_then(|n| n.strip_prefix('.'));
        let old = |n: &str| {
            n.contains("LayerNorm.")
                .then(|| n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
        };
        let mut tries = vec![name.to_owned()];
        tries.extend(bare.map(str::to_owned));
        tries.extend(old(name));
        tries.extend(bare.and_then(old));
        tries.into_iter().find(|n| self.files.place.contains_key(n))
    }

    fn load(&mut self, name: &str, shape: &[usize], options: &LoadOptions) -> Result<Option<Tensor>> {
        let Some(own) = self.resolve(name) else {
            self.missing.push(name.to_owned());
            return Ok(None);
        };
        let Some(file) = self.files.file_of(&own) else { return Ok(None) };
        let tensor = file.load(&own, &options.device)?;
        if tensor.dims() != shape {
            return Err(Error::Shape {
                path: file.path().to_owned(),
                tensor: own,
                expected: shape.to_vec(),
                found: tensor.dims().to_vec(),
            });
        }
        self.taken.insert(own);
        Ok(Some(tensor))
    }
}

impl WeightSource for FolderSource {
    fn path(&self) -> &Path {
        &self.files.folder
    }

    fn has(&self, name: &str) -> bool {
        self.resolve(name).is_some()
    }

    fn dense(&mut self, name: &str, shape: &[usize], options: &LoadOptions) -> Result<Tensor> {
        match self.load(name, shape, options)? {
            Some(tensor) => Ok(tensor.to_dtype(options.dtype)?),
            None => Ok(Tensor::zeros(shape, options.dtype, &options.device)?),
        }
    }

    fn matrix(
        &mut self,
        name: &str,
        d_out: usize,
        d_in: usize,
        transposed: bool,
        options: &LoadOptions,
    ) -> Result<FrozenWeight> {
        let shape = if transposed { [d_in, d_out] } else { [d_out, d_in] };
        let Some(tensor) = self.load(name, &shape, options)? else {
            return Ok(FrozenWeight::dense(Tensor::zeros((d_out, d_in), options.dtype, &options.device)?)?);
        };
        let tensor = if transposed { tensor.t()?.contiguous()? } else { tensor };
        match options.quantization {
            Some(quantization) => quantization.apply(&tensor.to_dtype(DType::F32)?),
            None => Ok(FrozenWeight::dense(tensor.to_dtype(options.dtype)?)?),
        }
    }

    fn missing(&self) -> &[String] {
        &self.missing
    }

    fn unused(&self) -> Vec<String> {
        self.files.place.keys().filter(|n| !self.taken.contains(*n) && !is_buffer(n)).cloned().collect()
    }
}

/// Constants that older versions of transformers saved with the weights.
fn is_buffer(name: &str) -> bool {
    name.ends_with(".inv_freq")
        || name.ends_with(".position_ids")
        || name.ends_with(".masked_bias")
        || (name.ends_with(".attn.bias") && !name.contains("c_attn"))
}
