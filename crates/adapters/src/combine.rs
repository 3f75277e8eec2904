//! Several adapters acting at once on one module.
//!
//! Equation: y = W x + sum_i w_i (f_i(x) - W x)
//! Shapes:   x [.., d_in] -> y [.., d_out]
//! Source:   the delta-wise sum; PEFT's `set_adapters` with weights in diffusers
//! Cost:     the parts' costs, and one product with W for each part that is not a plain low-rank product

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;

use crate::adapter::Adapter;
use crate::{Flow, ParameterMap, Result};

/// A weighted sum of the changes of several adapters.
#[derive(Debug)]
pub struct WeightedSum {
    parts: Vec<(f64, Arc<dyn Adapter>)>,
}

impl WeightedSum {
    /// The sum of `parts` (weight, adapter).
    pub fn new(parts: Vec<(f64, Arc<dyn Adapter>)>) -> Self {
        Self { parts }
    }
}

impl Adapter for WeightedSum {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let y = base.forward(x)?;
        let mut sum = y.to_dtype(DType::F32)?;
        for (weight, part) in &self.parts {
            let additive = part.low_rank(base)?.filter(|v| v.gain.is_none() && v.residual.is_none());
            let change = match additive {
                Some(view) if part.dropout() == 0.0 || !flow.train => view.product(x)?,
                _ => (part.forward(base, x, flow)?.to_dtype(DType::F32)? - y.to_dtype(DType::F32)?)?,
            };
            sum = (sum + (change.to_dtype(DType::F32)? * *weight)?)?;
        }
        Ok(sum.to_dtype(x.dtype())?)
    }

    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (weight, part) in &self.parts {
            let Some(delta) = part.delta(base)? else { return Ok(None) };
            let delta = (delta * *weight)?;
            sum = Some(match sum {
                Some(sum) => (sum + delta)?,
                None => delta,
            });
        }
        Ok(sum)
    }

    fn rows(&self, rows: Range<usize>) -> Result<Option<Arc<dyn Adapter>>> {
        let mut parts = Vec::with_capacity(self.parts.len());
        for (weight, part) in &self.parts {
            let Some(part) = part.rows(rows.clone())? else { return Ok(None) };
            parts.push((*weight, part));
        }
        Ok(Some(Arc::new(Self { parts })))
    }

    fn lookup(&self, base: &Arc<FrozenWeight>, ids: &Tensor) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (weight, part) in &self.parts {
            let Some(change) = part.lookup(base, ids)? else { return Ok(None) };
            let change = (change.to_dtype(DType::F32)? * *weight)?;
            sum = Some(match sum {
                Some(sum) => (sum + change)?,
                None => change,
            });
        }
        Ok(sum)
    }

    /// 1 + sum_i w_i (g_i - 1).
    fn bias_gain(&self) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (weight, part) in &self.parts {
            let Some(gain) = part.bias_gain()? else { continue };
            let change = ((gain.to_dtype(DType::F32)? - 1.0)? * *weight)?;
            sum = Some(match sum {
                Some(sum) => (sum + change)?,
                None => (change + 1.0)?,
            });
        }
        Ok(sum)
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        for (i, (_, part)) in self.parts.iter().enumerate() {
            map.extend_under(&i.to_string(), part.parameters());
        }
        map
    }
}
