//! Cross entropy on the CPU, rows in parallel; the log of each row's sum is kept for the backward pass.

use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like, zeros};
use crate::parallel::{chunks, rows_per_piece};
use crate::vector::{exp_into, max, sum_exp};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::{Arc, OnceLock};

/// Fused log-softmax and negative log-likelihood.
pub(super) struct CrossEntropy {
    pub(super) labels: Arc<[u32]>,
    pub(super) weights: Option<Arc<[f32]>>,
    /// ln sum_j e^(x_ij) of each row, set by the forward pass.
    pub(super) log_sums: OnceLock<Vec<f32>>,
}

impl CrossEntropy {
    fn weight(&self, row: usize) -> f32 {
        self.weights.as_ref().map_or(1.0, |w| w[row])
    }

    /// (loss, log sum) of each row.
    fn losses<T: Element>(&self, x: &[T], v: usize) -> Vec<[f32; 2]> {
        let mut out = vec![[0f32; 2]; self.labels.len()];
        let per = rows_per_piece(v, 1);
        chunks(&mut out, per, x.len(), |i, piece| {
            let mut scratch = T::scratch(v);
            for (j, out) in piece.iter_mut().enumerate() {
                let row = i * per + j;
                let weight = self.weight(row);
                if weight != 0.0 {
                    let x = T::view(&x[row * v..][..v], &mut scratch);
                    let m = max(x);
                    let log_sum = m + sum_exp(x, m).ln();
                    *out = [weight * (log_sum - x[self.labels[row] as usize]), log_sum];
                }
            }
        });
        out
    }

    fn gradient<T: Element>(&self, x: &[T], g: &[f32], log_sums: &[f32], v: usize) -> Vec<T> {
        let mut dx = zeros::<T>(x.len());
        let per = rows_per_piece(v, 1);
        chunks(&mut dx, per * v, x.len(), |i, piece| {
            let (mut from, mut to) = (T::scratch(v), T::scratch(v));
            for (j, dx) in piece.chunks_mut(v).enumerate() {
                let row = i * per + j;
                let weight = self.weight(row);
                let scale = weight * g[row];
                if weight != 0.0 && scale != 0.0 {
                    let x = T::view(&x[row * v..][..v], &mut from);
                    T::write(dx, &mut to, |dx| {
                        exp_into(x, log_sums[row], scale, dx);
                        dx[self.labels[row] as usize] -= scale;
                    });
                }
            }
        });
        dx
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, v) = layout.shape().dims2()?;
        let rows = by_dtype!(x.dtype(), self.name(), T => self.losses::<T>(slice(x, layout)?, v));
        let _ = self.log_sums.set(rows.iter().map(|row| row[1]).collect());
        Ok((CpuStorage::F32(rows.iter().map(|row| row[0]).collect()), Shape::from(n)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        let ((sx, lx), (sg, lg)) = (x.storage_and_layout(), g.storage_and_layout());
        let Some(log_sums) = self.log_sums.get() else { bail!("cross_entropy: backward before forward") };
        let (g, v) = (cpu_slice::<f32>(&sg, lg)?, x.dim(1)?);
        by_dtype!(x.dtype(), self.name(), T => {
            Ok(Some(tensor_like(self.gradient::<T>(cpu_slice(&sx, lx)?, g, log_sums, v), x)?))
        })
    }
}
