//! Changes that are added to the product with the base, and what is dropped of them while training.
//!
//! Equation: y = W x + m * f(x); m zero at each output with probability p, everywhere with probability q, over their mean where
//!           it is asked for
//! Shapes:   x [.., d_in] -> y [.., d_out]; m `[d_out]`, one for all rows of a pass
//! Source:   the `rank_dropout` and `module_dropout` of LyCORIS and PEFT
//! Cost:     one multiplication an output

use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use rand::Rng;

use crate::adapter::checked_dropout;
use crate::{Flow, Result, random};

/// What is dropped of a change while training.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutputDropout {
    rows: f64,
    module: f64,
    scaled: bool,
}

impl OutputDropout {
    /// Each output with probability `rows`, the whole change with probability `module`; `scaled`: what stays is made larger by
    /// what was dropped.
    ///
    /// # Errors
    /// If they are no probabilities below 1.
    pub(crate) fn new(rows: f64, module: f64, scaled: bool) -> Result<Self> {
        Ok(Self { rows: checked_dropout(rows)?, module: checked_dropout(module)?, scaled })
    }

    /// The larger of the two probabilities: 0 where nothing is ever dropped.
    pub(crate) fn probability(&self) -> f64 {
        self.rows.max(self.module)
    }

    /// `change` [.., d_out] with zeros where this pass drops it, by the stream of `name`.
    fn apply(&self, change: &Tensor, flow: &Flow, name: &str) -> Result<Tensor> {
        if !flow.train || self.probability() == 0.0 {
            return Ok(change.clone());
        }
        let mut rng = random::stream(flow.random_key, name);
        let width = change.dims().last().copied().unwrap_or(0);
        let whole = rng.random::<f64>() >= self.module;
        let mut kept: Vec<f32> =
            (0..width).map(|_| if whole && rng.random::<f64>() >= self.rows { 1.0 } else { 0.0 }).collect();
        let mean = kept.iter().sum::<f32>() / width.max(1) as f32;
        if self.scaled && self.rows > 0.0 && mean > 0.0 {
            kept.iter_mut().for_each(|v| *v /= mean);
        }
        let mask = Tensor::from_vec(kept, width, change.device())?.to_dtype(change.dtype())?;
        Ok(change.broadcast_mul(&mask)?)
    }

    /// W x + m * `change` in the dtype of `x`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub(crate) fn add(
        &self,
        base: &Arc<FrozenWeight>,
        x: &Tensor,
        change: &Tensor,
        flow: &Flow,
        name: &str,
    ) -> Result<Tensor> {
        let change = self.apply(change, flow, name)?;
        Ok((base.forward(x)?.to_dtype(change.dtype())? + change)?.to_dtype(x.dtype())?)
    }
}
