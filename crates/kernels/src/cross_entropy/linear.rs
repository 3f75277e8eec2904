//! The output projection and the loss as one operation.
//!
//! Equation: z = x W^T; loss = logsumexp(z) - z_label; dx = (softmax(z) - e_label) W, made in the forward pass and scaled in
//!           the backward pass

use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like, zeros};
use crate::frozen::{FrozenWeight, with_operand};
use crate::parallel::chunks;
use crate::product::{Multiply, Term, multiply_into};
use crate::vector::{exp_in_place, max, scale, sum_exp};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::any::Any;
use std::sync::{Arc, OnceLock};

pub(super) struct LinearCrossEntropy {
    pub(super) weight: Arc<FrozenWeight>,
    pub(super) labels: Arc<[u32]>,
    pub(super) wants_gradient: bool,
    /// dx [n, h] for a gradient of one, in the element type of x.
    pub(super) gradient: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl LinearCrossEntropy {
    pub(super) fn new(weight: Arc<FrozenWeight>, labels: Arc<[u32]>, wants_gradient: bool) -> Self {
        Self { weight, labels, wants_gradient, gradient: OnceLock::new() }
    }

    fn forward<T: Multiply>(&self, x: &[T]) -> Result<Vec<f32>> {
        let (v, h) = self.weight.dims();
        let n = self.labels.len();
        let mut scores = vec![0f32; n * v];
        let mut wide = Vec::new();
        let rows = T::rows(x, &mut wide);
        with_operand(&self.weight, false, |w| multiply_into(n, v, &[Term::new(rows, w)], &mut scores, v, 0))?;
        let mut losses = vec![0f32; n];
        let pairs: Vec<_> = scores.chunks_mut(v).zip(&mut losses).zip(self.labels.iter()).collect();
        crate::parallel::tasks(pairs, n * v, |((z, loss), label)| {
            let top = max(z);
            let log_sum = top + sum_exp(z, top).ln();
            let label = *label as usize;
            *loss = log_sum - z[label];
            if self.wants_gradient {
                exp_in_place(z, log_sum);
                z[label] -= 1.0;
            }
        });
        if self.wants_gradient {
            let slopes = T::narrowed(scores);
            let mut wide = Vec::new();
            let rows = T::rows(&slopes, &mut wide);
            let dx = with_operand(&self.weight, true, |w| T::multiply(n, h, &[Term::new(rows, w)]))?;
            let _ = self.gradient.set(Box::new(dx));
        }
        Ok(losses)
    }
}

/// Rows of `unit` [n, h], each times its factor.
fn scaled<T: Element>(unit: &[T], factors: &[f32]) -> Vec<T> {
    let h = unit.len() / factors.len().max(1);
    let mut out = zeros::<T>(unit.len());
    chunks(&mut out, h, unit.len(), |i, row| {
        let (mut from, mut to) = (T::scratch(h), T::scratch(h));
        let unit = T::view(&unit[i * h..][..h], &mut from);
        T::write(row, &mut to, |row| {
            row.copy_from_slice(unit);
            scale(factors[i], row);
        });
    });
    out
}

impl CustomOp1 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let losses = by_dtype!(x.dtype(), self.name(), T => self.forward::<T>(slice(x, layout)?)?);
        Ok((CpuStorage::F32(losses), Shape::from(self.labels.len())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward_on(x, layout)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return self.backward_on(x, &g).map(Some);
        }
        let (storage, layout) = g.storage_and_layout();
        let factors = cpu_slice::<f32>(&storage, layout)?;
        by_dtype!(x.dtype(), self.name(), T => {
            let Some(unit) = self.gradient.get().and_then(|d| d.downcast_ref::<Vec<T>>()) else {
                bail!("linear-cross-entropy: the forward pass was told that no gradient is wanted")
            };
            Ok(Some(tensor_like(scaled(unit, factors), x)?))
        })
    }
}
