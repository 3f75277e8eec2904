//! The weighted sum of several adapters as one low-rank adapter: what acts together becomes a file that any tool reads.
//!
//! Equation: sum_i w_i s_i B_i A_i = B A with A = [A_1; A_2; ..], B = [w_1 s_1 B_1, w_2 s_2 B_2, ..]
//! Shapes:   A [sum r_i, d_in], B [d_out, sum r_i], module by module; the ranks of modules differ where the parts' do
//! Source:   the delta-wise sum; PEFT's `add_weighted_adapter` with `combination_type="cat"`

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::products::{self, Product};
use crate::attach::{Attached, Origin, attach};
use crate::config::AdapterConfig;
use crate::module::Host;
use crate::parametrisation::MethodConfig;
use crate::parametrisation::lora::{Lora, LoraLayer};
use crate::target::{Pattern, TargetSpec};
use crate::{Error, Result};

const LAYOUT: &str = "sum of adapters";

/// The adapter that acts as `parts` (adapter, weight) do together.
///
/// # Errors
/// If a part changes more than low-rank products do, or two of them disagree on whether the output head follows the token table.
pub fn of(host: &mut dyn Host, parts: &[(&Attached, f64)]) -> Result<Attached> {
    let Some((first, _)) = parts.first() else {
        return Err(Error::unsupported("a sum of no adapters", "there is nothing to write"));
    };
    let mut modules: BTreeMap<String, Vec<(f64, Product)>> = BTreeMap::new();
    for (adapter, weight) in parts {
        for product in products::of(host, adapter, LAYOUT)? {
            if product.magnitude.is_some() {
                return Err(Error::unsupported(
                    format!("the sum of adapters at {}", product.path),
                    "one of them has magnitudes, so the sum is no low-rank product; merge them into the base",
                ));
            }
            modules.entry(product.path.clone()).or_default().push((weight * product.scale, product));
        }
    }
    let table = host.tied_table();
    let ties: BTreeSet<bool> = parts
        .iter()
        .filter(|(adapter, _)| table.as_ref().is_some_and(|table| adapter.layers.contains_key(table)))
        .map(|(adapter, _)| adapter.config.tie_weights)
        .collect();
    if ties.len() > 1 {
        return Err(Error::unsupported(
            "the sum of adapters of the token table",
            "one keeps the output head tied to the table and another does not",
        ));
    }
    let (mut tensors, mut ranks) = (BTreeMap::new(), BTreeMap::new());
    for (path, products) in &modules {
        let a: Vec<&Tensor> = products.iter().map(|(_, p)| &p.a).collect();
        let b = products.iter().map(|(scale, p)| Ok((&p.b * *scale)?)).collect::<Result<Vec<Tensor>>>()?;
        let a = Tensor::cat(&a, 0)?;
        let lookup = products.iter().any(|(_, p)| p.lookup);
        let (name_a, name_b) = LoraLayer::names(lookup);
        ranks.insert(path.clone(), a.dim(0)?);
        tensors.insert(format!("{path}.{name_a}"), a);
        tensors.insert(format!("{path}.{name_b}"), Tensor::cat(&b, 1)?.contiguous()?);
    }
    let r = ranks.values().copied().max().unwrap_or(0);
    let smaller = || ranks.iter().filter(|(_, rank)| **rank != r).map(|(path, rank)| (regex::escape(path), *rank));
    let targets = TargetSpec {
        target_modules: Pattern::Endings(ranks.keys().cloned().collect()),
        rank_pattern: smaller().collect(),
        alpha_pattern: smaller().map(|(path, rank)| (path, rank as f64)).collect(),
        ..TargetSpec::default()
    };
    let config = AdapterConfig {
        targets,
        task: first.config.task,
        base: first.config.base.clone(),
        revision: first.config.revision.clone(),
        tie_weights: ties.into_iter().next().unwrap_or(first.config.tie_weights),
        // With alpha = r at every module the factors are 1: what the parts have of them is in B.
        ..AdapterConfig::new(MethodConfig::Lora(Lora { r, alpha: r as f64, ..Lora::default() }))
    };
    let origin = Origin::File { path: Path::new("(sum of adapters)"), tensors };
    attach(host, &config, origin, DType::F32, &Device::Cpu)
}
