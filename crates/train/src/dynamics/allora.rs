//! ALLoRA: no dropout and no scale, but a rate for each output row, large where the product is near 0 and falling as it grows.
//!
//! Equation: h_i = 1 / sqrt(|(B A)_i| + 1 / eta^2); A and B see the gradient diag(h) dL/d(B A), the input sees dL/d(B A);
//!           |(B A)_i|^2 = b_i (A A^T) b_i
//! Shapes:   A [r, d_in], B [d_out, r], h `[d_out]`
//! Source:   arXiv 2410.09692 sections 3.2 and 3.3, listing 1. Adam undoes a constant factor on a gradient: `apply = update` puts h
//!           on the update of B and its mean on that of A instead, which is our reading of the paper's tables, not its text
//! Cost:     2 r^2 (d_in + d_out) FLOPs a site and step, and products of rank 2 r in place of r; no parameters, no state

use std::sync::Arc;

use candle_core::{D, Tensor};
use espalier_adapters::{Adapter, Flow, FrozenWeight, Host, LowRankView, ModuleMut, ParameterMap};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Dynamics, Example, Fit, Moving, Rates, Settings, Sums, checked_positive};
use crate::optimizer::{NO_HOLDS, Step};
use crate::pairs::{Pair, pairs, unfit};
use crate::Result;

/// Where the rates act.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Apply {
    /// On the gradients of A and B.
    #[default]
    Gradient,
    /// On the optimiser's updates of A and B.
    Update,
}

/// How ALLoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Allora {
    /// The rate of a row that is 0.
    pub eta: f64,
    /// Where the rates act: gradient, update.
    pub apply: Apply,
}

impl Default for Allora {
    fn default() -> Self {
        Self { eta: std::f64::consts::SQRT_2, apply: Apply::Gradient }
    }
}

impl Settings for Allora {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        checked_positive("eta", self.eta)?;
        let pairs = pairs("allora", fit.model, fit.attached)?;
        for pair in &pairs {
            let (path, scale) = (&pair.path, pair.scale);
            if scale != 1.0 {
                return Err(unfit("allora", format!("{path}: the product has a scale of {scale}; set alpha to the rank")));
            }
            if pair.dropout > 0.0 {
                return Err(unfit("allora", format!("{path}: it takes the place of dropout; set dropout to 0")));
            }
            if pair.lookup {
                return Err(unfit("allora", format!("{path} looks up rows; its rates act on outputs of a product")));
            }
        }
        Ok(State { settings: self.clone(), pairs, mean: 0.0 })
    }

    fn examples() -> Vec<Example<Self>> {
        let adapter = "method = 'lora'\nr = 3\nalpha = 3";
        vec![
            Example { name: "as it comes", settings: Self::default(), adapter },
            Example { name: "on updates", settings: Self { apply: Apply::Update, eta: 2.0 }, adapter },
        ]
    }
}

/// The rates h `[d_out]` of the rows of B A, off the tape.
///
/// # Errors
/// If shapes do not fit.
pub fn rates(a: &Tensor, b: &Tensor, eta: f64) -> candle_core::Result<Tensor> {
    let (a, b) = (a.detach(), b.detach());
    let gram = a.matmul(&a.t()?)?;
    let norm = (b.matmul(&gram)? * &b)?.sum(D::Minus1)?.maximum(0.0)?.sqrt()?;
    (norm + 1.0 / (eta * eta))?.sqrt()?.recip()
}

/// A layer whose A and B see their gradients row by row at other rates while it trains; elsewhere it is the layer itself.
#[derive(Debug)]
pub struct RowRates {
    inner: Arc<dyn Adapter>,
    eta: f64,
}

impl RowRates {
    /// The layer `inner`, a plain product, at rates that start at `eta`.
    pub fn new(inner: Arc<dyn Adapter>, eta: f64) -> Self {
        Self { inner, eta }
    }
}

/// The product B A, written so that the gradients of A and B are of diag(h) dL/d(B A): with A_0, B_0 the same values off the
/// tape it is (B_0 + h (B - B_0)) A_0 + (h B_0) (A - A_0), of which the second term and its part in the input's gradient are 0.
fn with_rates(view: LowRankView, eta: f64) -> candle_core::Result<LowRankView> {
    let (a, b) = (&view.a, &view.b);
    let (a0, b0) = (a.detach(), b.detach());
    let h = rates(a, b, eta)?.unsqueeze(1)?;
    let up = (&b0 + (b - &b0)?.broadcast_mul(&h)?)?;
    let down = Tensor::cat(&[&a0, &(a - &a0)?], 0)?;
    let up = Tensor::cat(&[&up, &b0.broadcast_mul(&h)?], 1)?;
    Ok(LowRankView { a: down, b: up, ..view })
}

impl Adapter for RowRates {
    fn parameters(&self) -> ParameterMap {
        self.inner.parameters()
    }

    fn low_rank(&self, base: &Arc<FrozenWeight>) -> espalier_adapters::Result<Option<LowRankView>> {
        self.inner.low_rank(base)
    }

    fn low_rank_in(&self, base: &Arc<FrozenWeight>, flow: &Flow) -> espalier_adapters::Result<Option<LowRankView>> {
        let view = self.inner.low_rank_in(base, flow)?;
        Ok(match view {
            Some(view) if flow.train => Some(with_rates(view, self.eta)?),
            other => other,
        })
    }
}

/// The products of a run.
#[derive(Debug)]
pub struct State {
    settings: Allora,
    pairs: Vec<Pair>,
    /// Mean of the rates of the last step.
    mean: f64,
}

impl State {
    /// Puts into the slot of each product what `layer` makes of the layer that belongs there.
    fn slots(&self, moving: &mut Moving<'_>, layer: impl Fn(Arc<dyn Adapter>) -> Arc<dyn Adapter>) -> Result<()> {
        let attached = moving.attached;
        let ours = |path: &str| self.pairs.iter().any(|pair| pair.path == path);
        moving.model.walk(&mut |module| {
            if let ModuleMut::Linear(linear) = module
                && ours(linear.path())
                && let Some(own) = attached.layers.get(linear.path())
            {
                linear.set_adapter(Some(layer(own.clone())));
            }
            Ok(())
        })?;
        Ok(())
    }
}

impl Dynamics for State {
    fn enter(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        match self.settings.apply {
            Apply::Gradient => self.slots(moving, |own| Arc::new(RowRates::new(own, self.settings.eta))),
            Apply::Update => Ok(()),
        }
    }

    fn update(&mut self, moving: &mut Moving<'_>, sums: &Sums, rates_of_step: Rates) -> Result<()> {
        let Rates { lr, scale } = rates_of_step;
        let mut rest = sums.to_vec();
        let mut means = Vec::with_capacity(self.pairs.len());
        for pair in &self.pairs {
            let h = rates(&pair.down.tensor, &pair.up.tensor, self.settings.eta)?;
            let mean = h.mean_all()?;
            means.push(mean.clone());
            if self.settings.apply == Apply::Gradient {
                continue;
            }
            for (side, factor) in [(&pair.down, mean.reshape((1, 1))?), (&pair.up, h.unsqueeze(1)?)] {
                let Some((i, gradient)) = side.index.and_then(|i| Some((i, rest.get_mut(i)?.take()?))) else { continue };
                let direction = moving.optimizer.direction(&side.name, &gradient, scale)?;
                moving.optimizer.advance(i, &direction.broadcast_mul(&factor)?, lr)?;
            }
        }
        self.mean = f64::from(Tensor::stack(&means, 0)?.mean_all()?.to_scalar::<f32>()?);
        moving.optimizer.step(&rest, Step { lr, scale, holds: &NO_HOLDS })
    }

    fn leave(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        self.slots(moving, |own| own)
    }

    fn metrics(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("row_rate".into(), self.mean.into());
        map
    }
}
