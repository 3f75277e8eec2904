//! What trials are tried on: adapters that PEFT wrote, and every method in each of its examples.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::adapter::{EvidenceKind, Property};
use espalier_adapters::attach::{Attached, attach_from_data};
use espalier_adapters::formats::{folder, safetensors};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, Host, MethodConfig, ModuleMut, Site};
use espalier_models::{LoadOptions, Model, TokenBatch};

use crate::golden;

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

/// Golden adapters that are refused with a reason, by name: they are no subjects. What is refused is tried with R-01.
///
/// # Errors
/// If the golden files cannot be listed.
pub fn refused() -> Result<Vec<String>> {
    Ok(golden::cases()?.into_iter().filter(|case| case.refused.is_some()).map(|case| case.name).collect())
}

/// Every subject there is.
///
/// # Errors
/// If the golden files cannot be read.
pub fn all() -> Result<Vec<Subject>> {
    let mut all = Vec::new();
    for case in golden::cases()?.into_iter().filter(|case| case.refused.is_none()) {
        all.push(Subject { name: case.name, base: case.base, origin: Kind::Golden(case.path) });
    }
    for base in BASES {
        all.extend(MethodConfig::examples().into_iter().map(|(name, method)| Subject {
            name: format!("{name} on {base}"),
            base: golden::folder().join(base),
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
            let config = AdapterConfig::new(method);
            let attached =
                attach_from_data(model, &config, (1, 1e-3), DType::F32, &Device::Cpu, &mut evidence(&config))?;
            off_start(&attached, 2)?;
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

/// What the data of no task says at a site, for methods that start from data.
pub(crate) fn evidence(config: &AdapterConfig) -> impl FnMut(&Site) -> espalier_adapters::Result<Tensor> {
    let kind = config.method.wanted().map(|wanted| wanted.kind);
    move |site| {
        let draw = |shape| normal(&mut stream(3, &site.path), MOVED, shape, &Device::Cpu);
        match kind {
            Some(EvidenceKind::Gradient) => draw((site.d_out, site.d_in)),
            _ => draw((site.d_in, site.d_in)).and_then(|x| Ok(x.matmul(&x.t()?)?)),
        }
    }
}

/// Moves every trained tensor of a fresh adapter off its start, by noise of the stream `seed`.
///
/// # Errors
/// If a tensor is no variable.
pub fn off_start(attached: &Attached, seed: u64) -> Result<()> {
    for p in attached.parameters.trainable() {
        let noise = normal(&mut stream(seed, &p.name), MOVED, p.tensor.shape(), &Device::Cpu)?;
        p.var()?.set(&(p.tensor.detach() + noise)?)?;
    }
    Ok(())
}

/// A set with `adapter` as its only one, acting.
///
/// # Errors
/// If it does not fit the model.
pub fn acting(model: &mut dyn Host, adapter: Attached) -> Result<AdapterSet> {
    let mut set = AdapterSet::new();
    set.add("a", adapter)?;
    set.activate(model, &[("a", 1.0)])?;
    Ok(set)
}

/// Why the adapter's method cannot be merged, where it says so; then the merge of `set`, in which it is the only one, must be
/// refused with that reason and change nothing.
///
/// # Errors
/// If it is not refused, or with another reason, or something changed.
pub fn refuses_merge(set: &mut AdapterSet, model: &mut Model, dtype: DType) -> Result<Option<&'static str>> {
    let Some(reason) = set.get("a")?.config.method.exception(Property::Merge) else { return Ok(None) };
    let (before, weights) = (scores(model)?, live_weights(model)?);
    let refused = set.merge(model, dtype).err().map(|e| e.to_string()).unwrap_or_default();
    anyhow::ensure!(refused.contains(reason), "the merge was not refused because {reason}: {refused}");
    anyhow::ensure!(difference(&scores(model)?, &before)? == 0.0, "a refused merge changed the scores");
    anyhow::ensure!(live_weights(model)? == weights, "a refused merge changed weights");
    Ok(Some(reason))
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

/// All values, in f64.
///
/// # Errors
/// If they cannot be read.
pub fn values(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Greatest absolute value; infinite where one is no number.
pub fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(f64::abs).fold(0.0, |m, d| if d >= 0.0 { d.max(m) } else { f64::INFINITY })
}

/// Greatest absolute difference; infinite where something is no number or the shapes differ.
///
/// # Errors
/// If the values cannot be read.
pub fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.dims() != b.dims() {
        return Ok(f64::INFINITY);
    }
    Ok(largest(values(a)?.into_iter().zip(values(b)?).map(|(x, y)| x - y)))
}

/// Greatest absolute difference over the greatest absolute value of `b`.
///
/// # Errors
/// If the values cannot be read.
pub fn relative(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (d, top) = (difference(a, b)?, largest(values(b)?));
    Ok(if d == 0.0 { 0.0 } else { d / top })
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
