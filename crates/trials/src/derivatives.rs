//! gradients are derivatives, and what a method computes is the weight it says.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::adapter::Reach;
use espalier_adapters::attach::{Attached, attach_from_data};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{
    Adapter, AdapterConfig, AdapterSet, Flow, FrozenWeight, Host, Linear, MethodConfig, ModuleMut, ParameterMap,
};

use crate::subject::{self, acting, relative, values};
use crate::{Limit, Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-06",
    title: "Gradients as derivatives",
    claim: "For every method that acts on linear maps, in each of its examples, the gradient of every value of every trainable tensor is the central \
            difference of the loss in f64, through a wide map with a bias and a narrow one that files keep transposed, both \
            adapted and off their start, with dropout's mask held still; the error is |difference| / (1 + |derivative|). \
            Where a method leaves something out of its gradients on purpose it says so (`Adapter::holds`): there the \
            difference is taken with that held still, and one that says so without need fails. A fresh adapter starts at \
            its base, and acts in evaluation as the weight W + ΔW of its own delta. The bounded form takes every third value.",
    unit: "largest error of a gradient against a difference, f64",
    bar: 1e-6,
    bounded: 770,
    full: 2300,
    run,
};

const START: Limit = Limit { unit: "largest relative difference of a fresh adapter from its base, f64", bar: 1e-5 };
const WEIGHT: Limit = Limit { unit: "largest relative difference of outputs from (W + ΔW) x, f64", bar: 1e-5 };

/// Step of the differences.
const STEP: f64 = 1e-5;
/// An error above this is one of the formula, not of the step.
const WRONG: f64 = 1e-6;
const IN: usize = 8;
const INNER: usize = 16;
const OUT: usize = 9;
const ROWS: usize = 5;

fn draw(name: &str, std: f64, shape: &[usize]) -> Result<Tensor> {
    Ok(normal(&mut stream(5, name), std, shape, &Device::Cpu)?.to_dtype(DType::F64)?)
}

/// down(tanh(up(x))): a wide map with a bias, and one that files keep transposed.
struct Site {
    maps: [Linear; 2],
    x: Tensor,
    /// What every output counts for in the loss.
    probe: Tensor,
}

impl Site {
    fn new() -> Result<Self> {
        let up = FrozenWeight::dense(draw("up", 0.4, &[INNER, IN])?)?;
        let down = FrozenWeight::dense(draw("down", 0.3, &[OUT, INNER])?)?;
        let up = Linear::new("model.layers.0.up_proj", up, Some(draw("bias", 0.1, &[INNER])?), false)?;
        let maps = [up, Linear::new("model.layers.0.down_proj", down, None, true)?];
        Ok(Self { maps, x: draw("x", 1.0, &[ROWS, IN])?, probe: draw("probe", 1.0, &[ROWS, OUT])? })
    }

    fn forward(&self, flow: &Flow) -> Result<Tensor> {
        let [up, down] = &self.maps;
        Ok(down.forward(&up.forward(&self.x, flow)?.tanh()?, flow)?)
    }

    /// A scalar in which every output counts, and not the same.
    fn loss(&self, flow: &Flow) -> Result<Tensor> {
        let y = self.forward(flow)?;
        anyhow::ensure!(y.dtype() == DType::F64, "outputs are {:?}", y.dtype());
        Ok(((&y * &self.probe)? + (y.sqr()? * 0.5)?)?.sum_all()?)
    }
}

impl Host for Site {
    fn walk(
        &mut self,
        visit: &mut dyn FnMut(ModuleMut<'_>) -> espalier_adapters::Result<()>,
    ) -> espalier_adapters::Result<()> {
        self.maps.iter_mut().try_for_each(|linear| visit(ModuleMut::Linear(linear)))
    }

    fn head_paths(&self) -> Vec<String> {
        Vec::new()
    }

    fn base_hash(&self) -> espalier_adapters::Result<String> {
        Ok("none".into())
    }
}

/// What a layer with a gain over norms computes where the gain stands still, written out.
#[derive(Debug)]
struct Still {
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: f64,
    gain: Tensor,
    dropout: f64,
    path: String,
}

impl Adapter for Still {
    fn forward(&self, _: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> espalier_adapters::Result<Tensor> {
        let dropped = flow.dropout(x, self.dropout, &self.path)?;
        let change = (dropped.matmul(&self.a.t()?)?.matmul(&self.b.t()?)? * self.scale)?;
        Ok((x.matmul(&self.weight.t()?)? + change)?.broadcast_mul(&self.gain)?)
    }

    fn parameters(&self) -> ParameterMap {
        ParameterMap::new()
    }
}

/// The site with every gain that its layers hold standing still, and the reasons; None if none holds one.
fn held(site: &Site) -> Result<Option<(Site, &'static str)>> {
    let (mut maps, mut reason) = (site.maps.clone(), None);
    for linear in &mut maps {
        let (Some(adapter), base, path) = (linear.adapter().cloned(), linear.base().clone(), linear.path().to_owned())
        else {
            continue;
        };
        let Some(why) = adapter.holds() else { continue };
        let view = adapter.low_rank(&base)?.with_context(|| format!("{why}: not in the low-rank form"))?;
        let gain = view.gains(&base)?.with_context(|| format!("{why}: there is no gain"))?.detach();
        let weight = view.start(&base).dequantize(DType::F64)?;
        let (a, b, scale) = (view.a.clone(), view.b.clone(), view.scale);
        let still = Still { weight, a, b, scale, gain, dropout: adapter.dropout(), path };
        linear.set_adapter(Some(Arc::new(still)));
        reason = Some(why);
    }
    Ok(reason.map(|why| (Site { maps, x: site.x.clone(), probe: site.probe.clone() }, why)))
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let every = if scope.is_full() { 1 } else { 3 };
    for (name, method) in MethodConfig::examples() {
        // Norms, tokens and sequences are not at this site.
        if method.reach() != Reach::Maps {
            tally.count("examples of methods that act on no map, left to other trials");
            continue;
        }
        one(&name, &method, every, tally).with_context(|| name.clone())?;
    }
    Ok(())
}

fn fresh(site: &mut Site, method: &MethodConfig) -> Result<Attached> {
    let config = AdapterConfig::new(method.clone());
    Ok(attach_from_data(site, &config, (1, 1e-3), DType::F64, &Device::Cpu, &mut subject::evidence(&config))?)
}

fn one(name: &str, method: &MethodConfig, every: usize, tally: &mut Tally) -> Result<()> {
    let base = Site::new()?.forward(&Flow::eval())?;
    let mut site = Site::new()?;
    let attached = fresh(&mut site, method)?;
    let parameters = attached.parameters.clone();
    let set = acting(&mut site, attached)?;
    if method.starts_at_base() {
        tally.beside(&START, name, relative(&site.forward(&Flow::eval())?, &base)?);
    }
    for p in parameters.trainable() {
        let noise = normal(&mut stream(2, &p.name), 0.2, p.tensor.shape(), &Device::Cpu)?.to_dtype(DType::F64)?;
        p.var()?.set(&(p.tensor.detach() + noise)?)?;
    }
    as_weights(name, &site, &set, tally)?;
    gradients(name, &site, &parameters, every, tally)
}

/// Every map against the weight that its adapter says it is.
fn as_weights(name: &str, site: &Site, set: &AdapterSet, tally: &mut Tally) -> Result<()> {
    anyhow::ensure!(set.active().len() == 1, "the adapter does not act");
    for linear in &site.maps {
        let (base, path) = (linear.base(), linear.path());
        let adapter = linear.adapter().with_context(|| format!("{path} is not adapted"))?;
        let Some(delta) = adapter.delta(base)? else {
            tally.count(format!("no weight of its own ({name})"));
            continue;
        };
        let x = draw(path, 1.0, &[ROWS, base.d_in()])?;
        let ours = adapter.forward(base, &x, &Flow::eval())?;
        let weight = (base.dequantize(DType::F64)? + delta.to_dtype(DType::F64)?)?;
        let error = relative(&ours, &x.matmul(&weight.t()?)?)?;
        tally.beside(&WEIGHT, format!("{path} of {name}"), error);
        tally.cell(name, "(W + ΔW) x", error);
    }
    Ok(())
}

fn gradients(name: &str, site: &Site, parameters: &ParameterMap, every: usize, tally: &mut Tally) -> Result<()> {
    let flow = Flow::train(3, 1, 4);
    let held = held(site)?;
    let all = site.loss(&flow)?.backward()?;
    let mut needed = false;
    for p in parameters.trainable() {
        let ours = values(all.get(&p.tensor).with_context(|| format!("{}: no gradient reaches it", p.name))?)?;
        let ours: Vec<f64> = ours.into_iter().step_by(every).collect();
        let mut errors = apart(&ours, &differences(site, p, every, &flow)?);
        if let (Some((still, why)), true) = (&held, errors.iter().any(|e| e.is_nan() || *e > WRONG)) {
            needed = true;
            errors = apart(&ours, &differences(still, p, every, &flow)?);
            tally.count(format!("tensors whose gradient leaves something out: {why}"));
        }
        for (i, error) in errors.into_iter().enumerate() {
            tally.value(format!("{} [{}] of {name}", p.name, i * every), error);
            tally.cell(name, "gradients", error);
        }
    }
    anyhow::ensure!(held.is_none() || needed, "it says that it holds something, and its gradients are the derivatives");
    Ok(())
}

fn apart(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).collect()
}

/// The derivative of the loss by each `every`-th value of a parameter, as a central difference.
fn differences(site: &Site, p: &espalier_adapters::Parameter, every: usize, flow: &Flow) -> Result<Vec<f64>> {
    let (start, var) = (values(&p.tensor)?, p.var()?);
    let at = |i: usize, step: f64| -> Result<f64> {
        let mut moved = start.clone();
        moved[i] += step;
        var.set(&Tensor::from_vec(moved, p.tensor.shape(), &Device::Cpu)?)?;
        Ok(site.loss(flow)?.to_scalar::<f64>()?)
    };
    let all = (0..start.len()).step_by(every).map(|i| Ok((at(i, STEP)? - at(i, -STEP)?) / (2.0 * STEP))).collect();
    at(0, 0.0)?;
    all
}
