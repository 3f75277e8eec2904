//! What the data says of each site before training, for methods that start from it.
//!
//! Rows go through the base once; then each block has its turn. Of the gradients of frozen weights, and of the moments of inputs,
//! those of one block exist at a time: what a method makes of them is small.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor, Var};
use espalier_adapters::adapter::{Evidence, EvidenceKind, Wanted};
use espalier_adapters::attach::{Origin, attach, sites};
use espalier_adapters::low_rank::flatten;
use espalier_adapters::target::{Pattern, TargetSpec};
use espalier_adapters::{
    Adapter, AdapterConfig, AdapterSet, Flow, FrozenWeight, Host, MethodConfig, ModuleMut, ParameterMap, Site,
};
use espalier_data::Batch;
use espalier_models::Model;

use crate::gradients::{Gradients, seed};
use crate::objective::{Objective, Targets};
use crate::recipe::Recipe;
use crate::setup::Data;
use crate::tape;
use crate::{Error, Result};

/// Tensors that a new adapter starts with, by full name; none where the method takes nothing from the data.
///
/// # Errors
/// If a row does not fit the model, a value is not finite, or the method cannot start from what it is given.
pub fn starts(
    recipe: &Recipe,
    model: &mut Model,
    config: &AdapterConfig,
    data: &Data,
    objective: &dyn Objective,
    first_lr: f64,
) -> Result<BTreeMap<String, Tensor>> {
    let Some(Wanted { kind, rows }) = config.method.wanted() else { return Ok(BTreeMap::new()) };
    let device = model.device().clone();
    let all: Vec<Site> = sites(model, config, &device)?.into_iter().filter(|site| !site.lookup).collect();
    let mut pass = Pass::new(data, objective, rows)?;
    let mut made = BTreeMap::new();
    let mut take = |site: &Site, values: &Tensor| -> Result<()> {
        let sum = values.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        if !sum.is_finite() {
            return Err(Error::run(&site.path, format!("what the data says of it is not finite ({sum})")));
        }
        let starts = config.method.starts(site, &Evidence { values, first_lr, seed: recipe.seed })?;
        made.extend(starts.into_iter().map(|(name, start)| (format!("{}.{name}", site.path), start)));
        Ok(())
    };
    match kind {
        EvidenceKind::Gradient => pass.gradients(model, &all, &mut take)?,
        EvidenceKind::InputMoment => pass.moments(model, &all, &mut take)?,
    }
    Ok(made)
}

/// Rows of the data on their way through the base.
struct Pass {
    batches: Vec<(Batch, Targets)>,
    /// Targets in all of them.
    weight: usize,
}

/// Takes what is known of one site.
type Take<'a> = dyn FnMut(&Site, &Tensor) -> Result<()> + 'a;

impl Pass {
    /// The first `rows` rows of the run.
    fn new(data: &Data, objective: &dyn Objective, rows: usize) -> Result<Self> {
        if rows == 0 {
            return Err(Error::recipe("adapter", "a method that starts from data needs at least one row of it"));
        }
        let (mut batches, mut seen) = (Vec::new(), 0);
        for i in 0..data.train.len_per_epoch(0)? {
            if seen >= rows {
                break;
            }
            let batch = data.train.batch(0, i)?;
            seen += batch.rows;
            let targets = objective.targets(&batch)?;
            batches.push((batch, targets));
        }
        let weight = batches.iter().map(|(_, targets)| targets.weight()).sum();
        if weight == 0 {
            return Err(Error::recipe("data", format!("the first {seen} rows have no token that is trained on")));
        }
        Ok(Self { batches, weight })
    }

    /// The input of every block for every batch: one list for a block, and one more for the head.
    fn inputs(&self, model: &Model) -> Result<Vec<Vec<Tensor>>> {
        let mut all = vec![Vec::new(); model.blocks() + 1];
        for (batch, targets) in &self.batches {
            let input = tape::token_batch(model, batch, targets.separator)?;
            let begun = model.begin(&input, &Flow::eval())?;
            let mut x = begun.x.detach();
            for (i, inputs) in all.iter_mut().enumerate() {
                inputs.push(x.clone());
                if i < model.blocks() {
                    x = model.block(i, &x, &begun.context, &Flow::eval(), None)?.detach();
                }
            }
        }
        Ok(all)
    }

    /// Gradients of the mean loss with respect to the weights of `sites`, from the head down to the lowest of them.
    fn gradients(&mut self, model: &mut Model, sites: &[Site], take: &mut Take<'_>) -> Result<()> {
        let mut inputs = self.inputs(model)?;
        let lowest = sites.iter().map(|site| model.block_of(&site.path).unwrap_or(model.blocks())).min();
        let Some(lowest) = lowest else { return Ok(()) };
        let mut upstream: Vec<Tensor> = Vec::new();
        for stage in (lowest..=model.blocks()).rev() {
            let here: Vec<&Site> =
                sites.iter().filter(|s| model.block_of(&s.path).unwrap_or(model.blocks()) == stage).collect();
            let whole = Whole::put(model, &here)?;
            let mut gradients = Gradients::new(&whole.parameters);
            let inputs = inputs.pop().unwrap_or_default();
            let mut below = Vec::with_capacity(self.batches.len());
            for (i, ((batch, targets), x)) in self.batches.iter().zip(&inputs).enumerate() {
                let dx = if stage == model.blocks() {
                    let scale = 1.0 / self.weight as f64;
                    tape::head(model, x, targets, &Flow::eval(), scale, true, &mut gradients)?.1
                } else {
                    let input = tape::token_batch(model, batch, targets.separator)?;
                    let context = model.context(&input)?;
                    let leaf = Var::from_tensor(x)?;
                    let y = model.block(stage, leaf.as_tensor(), &context, &Flow::eval(), None)?;
                    gradients.add(&seed(&y, upstream[i].clone())?, Some(leaf.as_tensor()))?
                };
                below.push(dx.map_or_else(|| x.zeros_like(), Ok)?);
            }
            upstream = below;
            for (site, sum) in here.iter().zip(gradients.sums()) {
                let sum = match sum {
                    Some(sum) => sum.to_dtype(DType::F32)?,
                    None => Tensor::zeros((site.d_out, site.d_in), DType::F32, model.device())?,
                };
                take(site, &sum)?;
            }
            whole.remove(model)?;
        }
        Ok(())
    }

    /// Means of x x^T over the inputs x of `sites`, block by block.
    fn moments(&mut self, model: &mut Model, sites: &[Site], take: &mut Take<'_>) -> Result<()> {
        let mut inputs = self.inputs(model)?;
        for stage in (0..=model.blocks()).rev() {
            let inputs = inputs.pop().unwrap_or_default();
            let here: Vec<&Site> =
                sites.iter().filter(|s| model.block_of(&s.path).unwrap_or(model.blocks()) == stage).collect();
            if here.is_empty() {
                continue;
            }
            let probes: BTreeMap<&str, Arc<Probe>> =
                here.iter().map(|site| (site.path.as_str(), Arc::new(Probe::default()))).collect();
            set_adapters(model, |path| probes.get(path).map(|probe| probe.clone() as Arc<dyn Adapter>))?;
            for ((batch, targets), x) in self.batches.iter().zip(&inputs) {
                if stage == model.blocks() {
                    tape::score(model, x, targets, &Flow::eval())?;
                    continue;
                }
                let input = tape::token_batch(model, batch, targets.separator)?;
                model.block(stage, x, &model.context(&input)?, &Flow::eval(), None)?;
            }
            set_adapters(model, |_| None)?;
            for site in here {
                take(site, &probes[site.path.as_str()].mean(site.d_in)?)?;
            }
        }
        Ok(())
    }
}

/// Fills the slots of all linear maps.
fn set_adapters(model: &mut Model, of: impl Fn(&str) -> Option<Arc<dyn Adapter>>) -> Result<()> {
    model.walk(&mut |module| {
        if let ModuleMut::Linear(linear) = module {
            let adapter = of(linear.path());
            linear.set_adapter(adapter);
        }
        Ok(())
    })?;
    Ok(())
}

/// The weights of some sites as dense parameters in place of the frozen ones.
struct Whole {
    set: AdapterSet,
    parameters: ParameterMap,
}

impl Whole {
    fn put(model: &mut Model, sites: &[&Site]) -> Result<Self> {
        let mut set = AdapterSet::new();
        if sites.is_empty() {
            return Ok(Self { set, parameters: ParameterMap::new() });
        }
        let targets = TargetSpec {
            target_modules: Pattern::Endings(sites.iter().map(|site| site.path.clone()).collect()),
            ..TargetSpec::default()
        };
        let config = AdapterConfig { targets, ..AdapterConfig::new(MethodConfig::by_name("full")?) };
        let device = model.device().clone();
        let attached = attach(model, &config, Origin::Seed(0), DType::F32, &device)?;
        let parameters = attached.parameters.clone();
        set.add("whole", attached)?;
        set.activate(model, &[("whole", 1.0)])?;
        Ok(Self { set, parameters })
    }

    fn remove(mut self, model: &mut Model) -> Result<()> {
        Ok(self.set.disable(model)?)
    }
}

/// Notes the inputs of a map, and changes nothing.
#[derive(Debug, Default)]
struct Probe(Mutex<Option<(Tensor, usize)>>);

impl Probe {
    /// Mean of x x^T over what was noted.
    fn mean(&self, width: usize) -> Result<Tensor> {
        let noted = self.0.lock().map_err(|_| Error::run("inputs", "a thread that noted them failed"))?;
        Ok(match &*noted {
            Some((sum, count)) => (sum / *count as f64)?.to_dtype(DType::F32)?,
            None => Tensor::zeros((width, width), DType::F32, &candle_core::Device::Cpu)?,
        })
    }
}

impl Adapter for Probe {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, _: &Flow) -> espalier_adapters::Result<Tensor> {
        let rows = flatten(x)?.0.detach().to_dtype(DType::F32)?;
        let moment = rows.t()?.matmul(&rows)?;
        if let Ok(mut noted) = self.0.lock() {
            let (sum, count) = match noted.take() {
                Some((sum, count)) => ((sum + moment)?, count),
                None => (moment, 0),
            };
            *noted = Some((sum, count + rows.dim(0)?));
        }
        Ok(base.forward(x)?)
    }

    fn parameters(&self) -> ParameterMap {
        ParameterMap::new()
    }
}
