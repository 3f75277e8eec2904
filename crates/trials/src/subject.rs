//! What trials are tried on: adapters that PEFT wrote, and every method in each of its examples.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::adapter::Property;
use espalier_adapters::attach::{Attached, Origin, attach};
use espalier_adapters::formats::{folder, safetensors};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, Host, MethodConfig, ModuleMut};
use espalier_models::{LoadOptions, Model, TokenBatch};

use crate::root;

/// Golden models for adapters made here: a tied table and grouped heads, and weights that files keep transposed.
const BASES: [&str; 2] = ["families/llama_gqa_tied", "families/gpt2"];

/// How far fresh parameters are moved off their start, so that every adapter changes something.
const MOVED: f64 = 0.02;

/// An adapter to try, and the model it belongs to.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Folder of its base.
    pub base: PathBuf,
    origin: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Golden(PathBuf),
    Example(Box<MethodConfig>),
}

fn golden() -> PathBuf {
    root().join("parity/golden")
}

/// Every folder of an adapter that PEFT wrote, sorted.
fn written_by_peft() -> Result<Vec<PathBuf>> {
    let folder = golden().join("adapters");
    let entries = std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.join(folder::CONFIG_FILE).is_file());
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Golden adapters that are refused with a reason, by name: they are no subjects.
///
/// # Errors
/// If the golden files cannot be listed.
pub fn refused() -> Result<Vec<String>> {
    let refused = |path: &PathBuf| folder::read_config(path).is_err();
    Ok(written_by_peft()?.iter().filter(|path| refused(path)).map(|path| name_of(path)).collect())
}

/// Every subject there is.
///
/// # Errors
/// If the golden files cannot be read.
pub fn all() -> Result<Vec<Subject>> {
    let mut all = Vec::new();
    for path in written_by_peft()? {
        let Ok(config) = folder::read_config(&path) else { continue };
        let base = config.base.with_context(|| format!("{}: no base is named", name_of(&path)))?;
        all.push(Subject { name: name_of(&path), base: golden().join(base), origin: Kind::Golden(path) });
    }
    for base in BASES {
        all.extend(MethodConfig::examples().into_iter().map(|(name, method)| Subject {
            name: format!("{name} on {base}"),
            base: golden().join(base),
            origin: Kind::Example(Box::new(method)),
        }));
    }
    Ok(all)
}

impl Subject {
    /// Its folder, where PEFT wrote it.
    pub fn golden(&self) -> Option<&Path> {
        match &self.origin {
            Kind::Golden(path) => Some(path),
            Kind::Example(_) => None,
        }
    }

    /// Whether saving takes what moved out of the base back: the file then says the same in other tensors.
    pub fn moves_base(&self) -> Result<bool> {
        Ok(match &self.origin {
            Kind::Golden(path) => folder::read_config(path)?.method.portable().is_some(),
            Kind::Example(method) => method.portable().is_some(),
        })
    }

    /// Its base.
    pub fn model(&self, options: &LoadOptions) -> Result<Model> {
        Model::load(&self.base, options).with_context(|| self.name.clone())
    }

    /// The adapter on `model`, off its start.
    pub fn attach(&self, model: &mut Model) -> Result<Attached> {
        let mut made = || -> Result<Attached> {
            let method = match &self.origin {
                Kind::Golden(path) => {
                    return Ok(folder::load(model, folder::read(path)?, false, DType::F32, &Device::Cpu)?);
                }
                Kind::Example(method) => method.as_ref().clone(),
            };
            let attached = attach(model, &AdapterConfig::new(method), Origin::Seed(1), DType::F32, &Device::Cpu)?;
            for p in attached.parameters.trainable() {
                let noise = normal(&mut stream(2, &p.name), MOVED, p.tensor.shape(), &Device::Cpu)?;
                p.var()?.set(&(p.tensor.detach() + noise)?)?;
            }
            Ok(attached)
        };
        made().with_context(|| self.name.clone())
    }

    /// The adapter as files in `folder`.
    pub fn files(&self, folder: &Path) -> Result<()> {
        let Some(golden) = self.golden() else {
            let mut model = self.model(&LoadOptions::cpu())?;
            let attached = self.attach(&mut model)?;
            folder::save(&mut model, &attached, folder)?;
            return Ok(());
        };
        std::fs::create_dir_all(folder)?;
        for file in [folder::CONFIG_FILE, folder::WEIGHTS_FILE] {
            std::fs::copy(golden.join(file), folder.join(file))?;
        }
        Ok(())
    }
}

/// A set with `adapter` as its only one, acting.
///
/// # Errors
/// If it does not fit the model.
pub fn acting(model: &mut Model, adapter: Attached) -> Result<AdapterSet> {
    let mut set = AdapterSet::new();
    set.add("a", adapter)?;
    set.activate(model, &[("a", 1.0)])?;
    Ok(set)
}

/// Whether the adapter's method says that it cannot be merged; then the merge of `set`, in which it is the only one, must be
/// refused with that reason and change nothing.
///
/// # Errors
/// If it is not refused, or with another reason, or something changed.
pub fn refuses_merge(set: &mut AdapterSet, model: &mut Model, dtype: DType) -> Result<bool> {
    let Some(reason) = set.get("a")?.config.method.exception(Property::Merge) else { return Ok(false) };
    let (before, weights) = (scores(model)?, live_weights(model)?);
    let refused = set.merge(model, dtype).err().map(|e| e.to_string()).unwrap_or_default();
    anyhow::ensure!(refused.contains(reason), "the merge was not refused because {reason}: {refused}");
    anyhow::ensure!(difference(&scores(model)?, &before)? == 0.0, "a refused merge changed the scores");
    anyhow::ensure!(live_weights(model)? == weights, "a refused merge changed weights");
    Ok(true)
}

/// Scores of a fixed batch.
///
/// # Errors
/// If the model cannot be run.
pub fn scores(model: &Model) -> Result<Tensor> {
    const ROWS: usize = 2;
    const LENGTH: usize = 12;
    let ids = (0..ROWS * LENGTH).map(|i| (3 + i * 7 + i * i * 5) as u32 % 40).collect();
    let scores = model.forward(&TokenBatch::new(ids, ROWS, LENGTH)?, &Flow::eval())?;
    Ok(scores.detach().to_dtype(DType::F32)?)
}

/// Greatest absolute difference; infinite where something is no number or the shapes differ.
///
/// # Errors
/// If the values cannot be read.
pub fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.dims() != b.dims() {
        return Ok(f64::INFINITY);
    }
    let values = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let pairs = values(a)?.into_iter().zip(values(b)?);
    Ok(pairs.map(|(x, y)| (x - y).abs()).fold(0.0, |m, d| if d >= 0.0 { d.max(m) } else { f64::INFINITY }))
}

/// Every weight and bias that the model computes with now, byte for byte; quantised ones as what they stand for.
///
/// # Errors
/// If one cannot be read.
pub fn live_weights(model: &mut Model) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    model.walk(&mut |module| {
        let mut note = |t: &Tensor| -> espalier_adapters::Result<()> {
            all.push(safetensors::bytes_of(t)?);
            Ok(())
        };
        match module {
            ModuleMut::Linear(m) => {
                let base = m.base();
                match base.as_dense() {
                    Some(weight) => note(weight)?,
                    None => note(&base.dequantize(DType::F32)?)?,
                }
                m.bias().into_iter().try_for_each(|b| note(b.get()))
            }
            ModuleMut::Embedding(m) => note(m.weight().get()),
            ModuleMut::Norm(m) => {
                note(m.weight().get())?;
                m.bias().into_iter().try_for_each(|b| note(b.get()))
            }
        }
    })?;
    Ok(all)
}
