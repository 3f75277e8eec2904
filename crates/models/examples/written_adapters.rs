//! Writes an adapter of every method that PEFT has, in each of its examples that needs no data, with our scores, for `parity/check_ours.py --written`.
//!
//! `cargo run --release -p espalier-models --example written_adapters -- FOLDER`: FOLDER/<n>/ holds the adapter, its
//! `logits.safetensors` (ids and scores), and in `base` the path of its base below `parity/golden`.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::formats::folder;
use espalier_adapters::formats::safetensors::{Entry, write};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, MethodConfig};
use espalier_models::{LoadOptions, Model, TokenBatch};

/// Golden models: a tied table and grouped heads; biases; weights that files keep transposed.
const BASES: [&str; 3] = ["families/llama_gqa_tied", "families/llama_bias", "families/gpt2"];

fn main() -> Result<(), Box<dyn Error>> {
    let out = std::env::args().nth(1).ok_or("name the folder to write to")?;
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden");
    let (rows, length) = (2usize, 12usize);
    let ids: Vec<u32> = (0..rows * length).map(|i| (3 + i * 7 + i * i * 5) as u32 % 40).collect();
    let methods = MethodConfig::examples().into_iter().filter(|(_, m)| m.to_peft().is_some() && m.wanted().is_none());
    let pairs: Vec<_> =
        methods.flat_map(|(name, method)| BASES.map(|base| (name.clone(), method.clone(), base))).collect();
    for (i, (name, method, base)) in pairs.into_iter().enumerate() {
        let mut model = Model::load(&golden.join(base), &LoadOptions::cpu())?;
        let config = AdapterConfig::new(method);
        let adapter = attach(&mut model, &config, Origin::Seed(1), DType::F32, &Device::Cpu)
            .map_err(|e| format!("{name} on {base}: {e}"))?;
        for p in adapter.parameters.trainable() {
            let noise = normal(&mut stream(2, &p.name), 0.05, p.tensor.shape(), &Device::Cpu)?;
            p.var()?.set(&(p.tensor.detach() + noise)?)?;
        }
        let folder = Path::new(&out).join(format!("{i:03}"));
        folder::save(&mut model, &adapter, &folder)?;
        let mut set = AdapterSet::new();
        set.add("a", adapter)?;
        set.activate(&mut model, &[("a", 1.0)])?;
        let scores = model.forward(&TokenBatch::new(ids.clone(), rows, length)?, &Flow::eval())?;
        let scores = scores.detach().to_dtype(DType::F32)?;
        let wide: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let named = Tensor::from_vec(wide, (rows, length), &Device::Cpu)?;
        let entries = vec![Entry::of("ids", &named), Entry::of("logits", &scores)];
        write(&folder.join("logits.safetensors"), entries, &BTreeMap::new())?;
        std::fs::write(folder.join("base"), base)?;
        println!("{i:03} {name} on {base}");
    }
    Ok(())
}
