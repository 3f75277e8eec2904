//! adapters that act together act as the sum of their changes, also as one file.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::adapter::Reach;
use espalier_adapters::attach::{Attached, attach_from_data};
use espalier_adapters::formats::safetensors::TensorFile;
use espalier_adapters::formats::{folder, sum};
use espalier_adapters::parametrisation::lora::Lora;
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, Host, MethodConfig, ModuleMut};
use espalier_models::{LoadOptions, Model, TokenBatch};

use crate::subject::{self, difference, off_start};
use crate::{Bar, Scope, Tally, Trial, root};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-11",
    title: "Composition",
    claim: "Adapters that act together change every weight by the weighted sum of their own changes, computed in f64 beside \
            it: low-rank ones of mixed ranks up to full rank, and every method of maps in each of its examples beside a LoRA of \
            another rank. Low-rank sums are also written as one adapter, and read back. Further figure: two adapters that \
            PEFT wrote, written here as their weighted sum, against PEFT's logits; PEFT reads that file to the same logits \
            (`parity/composition.py`).",
    unit: "largest relative Frobenius error",
    bar: 1e-6,
    bounded: 160,
    full: 510,
    run,
};

/// Golden models: grouped heads, and weights that files keep transposed. Their width is 32.
const BASES: [&str; 2] = ["families/llama_gqa_tied", "families/gpt2"];
/// Ranks and weights of adapters that act together; 32 is full rank.
const SUMS: [&[(usize, f64)]; 4] = [&[(3, 1.0), (3, 1.0)], &[(32, 0.7), (32, -1.3)], &[(1, 2.0), (32, -0.25)], &[(2, 0.5), (5, 0.3), (8, -0.8)]];

type Weights = BTreeMap<String, Tensor>;

fn made(model: &mut Model, method: MethodConfig, seed: u64) -> Result<Attached> {
    let config = AdapterConfig::new(method);
    let evidence = &mut subject::evidence(&config);
    let attached = attach_from_data(model, &config, (seed, 1e-3), DType::F32, &Device::Cpu, evidence)?;
    off_start(&attached, seed + 100)?;
    Ok(attached)
}

/// What acts in the slots of linear maps, as changes of their weights.
fn changes(model: &mut Model) -> Result<Weights> {
    let mut all = Weights::new();
    model.walk(&mut |module| {
        if let ModuleMut::Linear(linear) = module
            && let Some(adapter) = linear.adapter()
            && let Some(delta) = adapter.delta(linear.base())?
        {
            all.insert(linear.path().to_owned(), delta.detach().to_dtype(DType::F64)?);
        }
        Ok(())
    })?;
    Ok(all)
}

/// sum_i w_i s_i B_i A_i from the adapters' tensors, in f64.
fn products(parts: &[(&Attached, &Lora, f64)]) -> Result<Weights> {
    let mut all = Weights::new();
    for (adapter, lora, weight) in parts {
        let r = lora.r as f64;
        let scale = weight * if lora.rslora { lora.alpha / r.sqrt() } else { lora.alpha / r };
        for path in adapter.layers.keys() {
            let of = |part: &str| -> Result<Tensor> {
                let p = adapter.parameters.get(&format!("{path}.{part}.weight")).with_context(|| path.clone())?;
                Ok(p.tensor.detach().to_dtype(DType::F64)?)
            };
            let product = (of("lora_B")?.matmul(&of("lora_A")?)? * scale)?;
            let sum = match all.remove(path) {
                Some(sum) => (sum + product)?,
                None => product,
            };
            all.insert(path.clone(), sum);
        }
    }
    Ok(all)
}

/// ||found - wanted|| / ||wanted|| over all modules, the largest.
fn worst(found: &Weights, wanted: &Weights) -> Result<f64> {
    ensure!(!wanted.is_empty() && found.keys().eq(wanted.keys()), "other modules are changed");
    let norm = |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    let mut worst: f64 = 0.0;
    for (path, wanted) in wanted {
        let size = norm(wanted)?;
        ensure!(size > 1e-3, "{path}: nothing is changed");
        let error = norm(&(&found[path] - wanted)?)? / size;
        worst = if error >= 0.0 { worst.max(error) } else { f64::INFINITY };
    }
    Ok(worst)
}

/// A set of adapters acting with weights, under their places as names.
fn together(model: &mut Model, parts: Vec<(Attached, f64)>) -> Result<AdapterSet> {
    let (mut set, mut wanted) = (AdapterSet::new(), Vec::new());
    for (i, (adapter, weight)) in parts.into_iter().enumerate() {
        set.add(&i.to_string(), adapter)?;
        wanted.push((i.to_string(), weight));
    }
    set.activate(model, &wanted.iter().map(|(n, w)| (n.as_str(), *w)).collect::<Vec<_>>())?;
    Ok(set)
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    for base in BASES {
        let path = root().join("parity/golden").join(base);
        let mut model = Model::load(&path, &LoadOptions::cpu())?;
        for seed in 0..if scope.is_full() { 30u64 } else { 8 } {
            for ranks in SUMS {
                low_rank(&mut model, base, ranks, seed, scope, tally)?;
            }
        }
        for (name, method) in MethodConfig::examples() {
            let other = MethodConfig::Lora(Lora { r: 5, alpha: 3.0, ..Lora::default() });
            if method.reach() != Reach::Maps {
                let parts = vec![(made(&mut model, method, 1)?, 0.6), (made(&mut model, other, 2)?, -1.5)];
                ensure!(together(&mut model, parts).is_err(), "{name}: weighed, though it is no change of maps");
                tally.count("methods that are no change of maps, refused");
                continue;
            }
            let parts = [(made(&mut model, method, 1)?, 0.6), (made(&mut model, other, 2)?, -1.5)];
            let mut wanted = Weights::new();
            let mut alone = Vec::new();
            for (adapter, weight) in parts {
                let set = together(&mut model, vec![(adapter, 1.0)])?;
                for (path, change) in changes(&mut model)? {
                    let change = (change * weight)?;
                    let sum = wanted.remove(&path).map_or(Ok(change.clone()), |sum| sum + &change)?;
                    wanted.insert(path, sum);
                }
                alone.push((set, weight));
            }
            let mut parts = Vec::new();
            for (mut set, weight) in alone {
                parts.push((set.remove(&mut model, "0")?, weight));
            }
            let _set = together(&mut model, parts)?;
            tally.value(format!("{name} beside lora on {base}"), worst(&changes(&mut model)?, &wanted)?);
            tally.count("pairs of methods");
        }
    }
    against_peft(scope, tally)
}

fn low_rank(
    model: &mut Model,
    base: &str,
    ranks: &[(usize, f64)],
    seed: u64,
    scope: &Scope<'_>,
    tally: &mut Tally,
) -> Result<()> {
    let loras: Vec<Lora> = (0..)
        .zip(ranks)
        .map(|(i, (r, _))| Lora { r: *r, alpha: 2.0 + f64::from(i), rslora: i % 2 == 1, ..Lora::default() })
        .collect();
    let adapters = loras.iter().zip(0..).map(|(lora, i)| made(model, MethodConfig::Lora(lora.clone()), 10 * seed + i));
    let adapters = adapters.collect::<Result<Vec<_>>>()?;
    let parts: Vec<_> = adapters.iter().zip(&loras).zip(ranks).map(|((a, l), (_, w))| (a, l, *w)).collect();
    let wanted = products(&parts)?;
    let name = format!("ranks {:?} on {base}, seed {seed}", ranks.iter().map(|(r, _)| *r).collect::<Vec<_>>());
    // As one adapter, from its file.
    let joined = sum::of(model, &parts.iter().map(|(a, _, w)| (*a, *w)).collect::<Vec<_>>())?;
    let file = scope.scratch.join("joined");
    folder::save(model, &joined, &file)?;
    let again = folder::load(model, folder::read(&file)?, false, DType::F32, &Device::Cpu)?;
    let _set = together(model, vec![(again, 1.0)])?;
    tally.value(format!("{name}, read back as one"), worst(&changes(model)?, &wanted)?);
    tally.count("low-rank sums, read back as one");
    // Acting together.
    let weights: Vec<f64> = ranks.iter().map(|(_, w)| *w).collect();
    let _set = together(model, adapters.into_iter().zip(weights).collect())?;
    tally.value(name, worst(&changes(model)?, &wanted)?);
    tally.count("low-rank sums");
    Ok(())
}

/// The two adapters of `parity/composition.py` as one, and the logits PEFT gives with both and with our file.
fn against_peft(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let golden = root().join("parity/golden");
    let wanted = TensorFile::open(&golden.join("composition/expected.safetensors"))?;
    let mut model = Model::load(&golden.join("families/llama_gqa_tied"), &LoadOptions::cpu())?;
    let mut parts = Vec::new();
    for (name, weight) in [("lora_all", 0.7), ("rslora_patterns", -0.5)] {
        let files = folder::read(&golden.join("adapters").join(name))?;
        parts.push((folder::load(&mut model, files, false, DType::F32, &Device::Cpu)?, weight));
    }
    let joined = sum::of(&mut model, &parts.iter().map(|(a, w)| (a, *w)).collect::<Vec<_>>())?;
    let file = scope.scratch.join("for-peft");
    folder::save(&mut model, &joined, &file)?;
    // What PEFT read is what is written now.
    let (read, now) = (golden.join("composition"), &file);
    let same = |name: &str| -> Result<bool> { Ok(std::fs::read(read.join(name))? == std::fs::read(now.join(name))?) };
    ensure!(same(folder::CONFIG_FILE)?, "the settings file is another than PEFT read");
    let tensors = |path: &std::path::Path| TensorFile::open(path)?.load_all(&Device::Cpu);
    let (there, here) = (tensors(&read.join(folder::WEIGHTS_FILE))?, tensors(&now.join(folder::WEIGHTS_FILE))?);
    ensure!(there.keys().eq(here.keys()), "other tensors than PEFT read");
    for (name, t) in &there {
        ensure!(difference(t, &here[name])? < 1e-6, "`{name}` is another than PEFT read");
    }
    let again = folder::load(&mut model, folder::read(&file)?, false, DType::F32, &Device::Cpu)?;
    let _set = together(&mut model, vec![(again, 1.0)])?;
    let ids = wanted.load("ids", &Device::Cpu)?;
    let (rows, length) = ids.dims2()?;
    let flat = ids.flatten_all()?.to_vec1::<i64>()?.into_iter().map(|id| id as u32).collect();
    let found = model.forward(&TokenBatch::new(flat, rows, length)?, &Flow::eval())?.detach();
    for (name, logits) in [("with both adapters", "logits"), ("with our file", "logits_of_ours")] {
        let d = difference(&found, &wanted.load(logits, &Device::Cpu)?)?;
        tally.figure(format!("largest |difference of logits| from PEFT's {name}"), d, Some(Bar::AtMost(1e-4)));
    }
    Ok(())
}
