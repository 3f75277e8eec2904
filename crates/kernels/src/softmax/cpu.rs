//! Softmax on the CPU, rows in parallel.
//!
//! Equation: backward softmax dx = y (g - sum(g y)); log-softmax dx = g - e^y sum(g)

use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like, zeros};
use crate::parallel::{chunks, rows_per_piece};
use crate::simd::{madd, multiversion};
use crate::vector::{dot, exp_in_place, exp_into, max, scale, sum, sum_exp};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

multiversion! {
    /// dx <- y (g - c)
    fn softmax_gradient[FMA](y: &[f32], g: &[f32], c: f32, dx: &mut [f32]) {
        let _ = FMA;
        for ((y, g), dx) in y.iter().zip(g).zip(dx) {
            *dx = y * (g - c);
        }
    }
}

multiversion! {
    /// y <- y + x, scaled by a
    fn add_scaled[FMA](a: f32, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.iter().zip(y) {
            *y = madd::<FMA>(a, *y, *x);
        }
    }
}

/// out row <- f(a row, b row).
fn rows<T: Element>(a: &[T], b: &[T], n: usize, f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) -> Vec<T> {
    let mut out = zeros::<T>(a.len());
    let size = rows_per_piece(n, 1) * n;
    chunks(&mut out, size, 2 * a.len(), |i, piece| {
        let (mut sa, mut sb, mut so) = (T::scratch(n), T::scratch(n), T::scratch(n));
        let range = i * size..i * size + piece.len();
        for ((a, b), out) in a[range.clone()].chunks(n).zip(b[range].chunks(n)).zip(piece.chunks_mut(n)) {
            let (a, b) = (T::view(a, &mut sa), T::view(b, &mut sb));
            T::write(out, &mut so, |out| f(a, b, out));
        }
    });
    out
}

fn width(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1)
}

fn forward(
    name: &str,
    x: &CpuStorage,
    layout: &Layout,
    f: impl Fn(&[f32], &mut [f32]) + Sync,
) -> Result<(CpuStorage, Shape)> {
    let out = by_dtype!(x.dtype(), name, T => {
        let x = slice::<T>(x, layout)?;
        <T as WithDType>::to_cpu_storage_owned(rows(x, x, width(layout), |x, _, y| f(x, y)))
    });
    Ok((out, layout.shape().clone()))
}

fn backward(
    name: &str,
    y: &Tensor,
    g: &Tensor,
    f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> Result<Option<Tensor>> {
    let g = g.contiguous()?;
    let ((sy, ly), (sg, lg)) = (y.storage_and_layout(), g.storage_and_layout());
    by_dtype!(y.dtype(), name, T => {
        let dx = rows(cpu_slice::<T>(&sy, ly)?, cpu_slice::<T>(&sg, lg)?, width(ly), f);
        Ok(Some(tensor_like(dx, y)?))
    })
}

/// Fused softmax.
pub(super) struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        forward(self.name(), x, layout, |x, y| {
            y.copy_from_slice(x);
            let total = exp_in_place(y, max(x));
            scale(1.0 / total, y);
        })
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        backward(self.name(), y, g, |y, g, dx| softmax_gradient(y, g, dot(y, g), dx))
    }
}

/// Fused log-softmax.
pub(super) struct LogSoftmax;

impl CustomOp1 for LogSoftmax {
    fn name(&self) -> &'static str {
        "log_softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        forward(self.name(), x, layout, |x, y| {
            let m = max(x);
            let log_sum = m + sum_exp(x, m).ln();
            y.iter_mut().zip(x).for_each(|(y, x)| *y = x - log_sum);
        })
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        backward(self.name(), y, g, |y, g, dx| {
            exp_into(y, 0.0, 1.0, dx);
            add_scaled(-sum(g), g, dx);
        })
    }
}
