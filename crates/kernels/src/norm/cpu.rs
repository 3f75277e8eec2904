//! The norms on the CPU: one pass over each row, rows in parallel, statistics recomputed in the backward pass.
//!
//! Equation: rms backward, r = 1/rms, gain = offset + w:
//!             dx = r g gain - x r^3 / h * sum(g gain x);  dw = sum over rows of g x r
//!           layer backward, xh = (x - mean) / deviation:
//!             dx = (g w - mean(g w) - xh mean(g w xh)) / deviation;  dw = sum g xh;  db = sum g
//! Weight gradients are summed per fixed piece of rows, then over pieces in order.

use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like, zeros};
use crate::parallel::{chunks, rows_per_piece, split, tasks};
use crate::simd::{madd, multiversion};
use crate::vector::{axpy, dot, dot3, sum, sum_squares_about};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

multiversion! {
    /// y <- (x - shift) * r * gain + bias
    fn normalise[FMA](x: &[f32], shift: f32, r: f32, gain: &[f32], bias: &[f32], y: &mut [f32]) {
        for (((x, gain), bias), y) in x.iter().zip(gain).zip(bias).zip(y) {
            *y = madd::<FMA>((x - shift) * r, *gain, *bias);
        }
    }
}

multiversion! {
    /// y <- x * r * gain
    fn scale_by[FMA](x: &[f32], r: f32, gain: &[f32], y: &mut [f32]) {
        let _ = FMA;
        for ((x, gain), y) in x.iter().zip(gain).zip(y) {
            *y = x * r * gain;
        }
    }
}

multiversion! {
    /// dx <- r * (g * gain) - a - b * (x - shift)
    fn input_gradient[FMA](g: &[f32], gain: &[f32], x: &[f32], shift: f32, r: f32, a: f32, b: f32, dx: &mut [f32]) {
        for (((g, gain), x), dx) in g.iter().zip(gain).zip(x).zip(dx) {
            *dx = madd::<FMA>(-b, x - shift, madd::<FMA>(r * g, *gain, -a));
        }
    }
}

multiversion! {
    /// dw <- dw + g * (x - shift) * r
    fn weight_gradient[FMA](g: &[f32], x: &[f32], shift: f32, r: f32, dw: &mut [f32]) {
        for ((g, x), dw) in g.iter().zip(x).zip(dw) {
            *dw = madd::<FMA>(g * r, x - shift, *dw);
        }
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

fn mean_and_inverse_deviation(x: &[f32], eps: f32) -> (f32, f32) {
    let mean = sum(x) / x.len() as f32;
    (mean, 1.0 / (sum_squares_about(x, mean) / x.len() as f32 + eps).sqrt())
}

/// Runs `row(x row, y row)` over all rows of `x`.
fn each_row<T: Element>(x: &[T], h: usize, row: impl Fn(&[f32], &mut [f32]) + Sync) -> Vec<T> {
    let mut out = zeros::<T>(x.len());
    let size = rows_per_piece(h, 1) * h;
    chunks(&mut out, size, x.len(), |i, piece| {
        let (mut from, mut to) = (T::scratch(h), T::scratch(h));
        for (x, y) in x[i * size..][..piece.len()].chunks(h).zip(piece.chunks_mut(h)) {
            let x = T::view(x, &mut from);
            T::write(y, &mut to, |y| row(x, y));
        }
    });
    out
}

/// Gradients: `row(x, g, dx row if wanted, sums)` over all rows; `sums` `[width]` is accumulated per piece, then in order.
fn each_gradient<T: Element>(
    x: &[T],
    g: &[T],
    h: usize,
    want_dx: bool,
    width: usize,
    row: impl Fn(&[f32], &[f32], Option<&mut [f32]>, &mut [f32]) + Sync + Send,
) -> (Option<Vec<T>>, Vec<f32>) {
    let size = rows_per_piece(h, 16) * h;
    let count = x.len().div_ceil(size);
    let mut dx = want_dx.then(|| zeros::<T>(x.len()));
    let mut partial = vec![0f32; count * width];
    let mut sums: Vec<&mut [f32]> = partial.chunks_mut(width.max(1)).collect();
    sums.resize_with(count, Default::default);
    let pieces = split(dx.as_deref_mut(), size, count);
    let work: Vec<_> = x.chunks(size).zip(g.chunks(size)).zip(pieces).zip(sums).collect();
    tasks(work, x.len(), |(((x, g), mut dx), sums)| {
        let (mut from, mut grad, mut to) = (T::scratch(h), T::scratch(h), T::scratch(h));
        for (i, (x, g)) in x.chunks(h).zip(g.chunks(h)).enumerate() {
            let (x, g) = (T::view(x, &mut from), T::view(g, &mut grad));
            match dx.as_deref_mut() {
                Some(dx) => T::write(&mut dx[i * h..][..h], &mut to, |dx| row(x, g, Some(dx), sums)),
                None => row(x, g, None, sums),
            }
        }
    });
    let mut total = vec![0f32; width];
    partial.chunks(width.max(1)).for_each(|p| axpy(1.0, p, &mut total));
    (dx, total)
}

/// A norm with frozen gain, as a step of a larger operation.
pub(crate) enum Normaliser {
    /// x / rms(x) * gain.
    Rms {
        /// Gain `[h]`, offset included.
        gain: Vec<f32>,
        /// Added to the mean square.
        eps: f32,
    },
    /// (x - mean) / deviation * gain + bias.
    Layer {
        /// Gain `[h]`.
        gain: Vec<f32>,
        /// Shift `[h]`.
        bias: Vec<f32>,
        /// Added to the variance.
        eps: f32,
    },
}

impl Normaliser {
    /// Rows of `x` normalised.
    pub(crate) fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        match self {
            Self::Rms { gain, eps } => each_row::<T>(x, gain.len(), |x, y| scale_by(x, inverse_rms(x, *eps), gain, y)),
            Self::Layer { gain, bias, eps } => each_row::<T>(x, gain.len(), |x, y| {
                let (mean, r) = mean_and_inverse_deviation(x, *eps);
                normalise(x, mean, r, gain, bias, y);
            }),
        }
    }

    /// The gradient of `x` for `g` of the result, and `beside` (a gradient that reaches x another way) added to it.
    pub(crate) fn backward<T: Element>(&self, x: &[T], g: &[T], beside: Option<&[T]>) -> Vec<T> {
        let h = match self {
            Self::Rms { gain, .. } | Self::Layer { gain, .. } => gain.len(),
        };
        let mut out = zeros::<T>(x.len());
        let size = rows_per_piece(h, 1) * h;
        chunks(&mut out, size, x.len(), |i, piece| {
            let (mut s1, mut s2, mut s3, mut to) = (T::scratch(h), T::scratch(h), T::scratch(h), T::scratch(h));
            for (j, dx) in piece.chunks_exact_mut(h).enumerate() {
                let at = i * size + j * h;
                let (x, g) = (T::view(&x[at..at + h], &mut s1), T::view(&g[at..at + h], &mut s2));
                let beside = beside.map(|b| T::view(&b[at..at + h], &mut s3));
                T::write(dx, &mut to, |dx| {
                    match self {
                        Self::Rms { gain, eps } => rms_input_gradient(x, g, gain, *eps, dx),
                        Self::Layer { gain, eps, .. } => layer_input_gradient(x, g, gain, *eps, dx),
                    }
                    if let Some(beside) = beside {
                        axpy(1.0, beside, dx);
                    }
                });
            }
        });
        out
    }
}

fn rms_input_gradient(x: &[f32], g: &[f32], gain: &[f32], eps: f32, dx: &mut [f32]) {
    let r = inverse_rms(x, eps);
    let b = r * r * r * dot3(g, gain, x) / x.len() as f32;
    input_gradient(g, gain, x, 0.0, r, 0.0, b, dx);
}

/// With s1 = mean(g w) and s2 = mean(g w xh): dx = r (g w - s1 - xh s2), xh = (x - mean) r.
fn layer_input_gradient(x: &[f32], g: &[f32], gain: &[f32], eps: f32, dx: &mut [f32]) {
    let h = x.len() as f32;
    let (mean, r) = mean_and_inverse_deviation(x, eps);
    dx.iter_mut().zip(x).for_each(|(d, x)| *d = x - mean);
    let s1 = dot(g, gain) / h;
    let s2 = r * dot3(g, gain, dx) / h;
    input_gradient(g, gain, x, mean, r, r * s1, r * r * s2, dx);
}

/// Fused RMS norm: x [.., h] and weight `[h]` f32.
pub(super) struct RmsNorm {
    pub(super) eps: f32,
    pub(super) offset: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let gain: Vec<f32> = slice::<f32>(w, lw)?.iter().map(|w| w + self.offset).collect();
        let out = by_dtype!(candle_core::backend::BackendStorage::dtype(x), self.name(), T => {
            let y = each_row::<T>(slice(x, lx)?, gain.len(), |x, y| scale_by(x, inverse_rms(x, self.eps), &gain, y));
            <T as candle_core::WithDType>::to_cpu_storage_owned(y)
        });
        Ok((out, lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let ((sx, lx), (sw, lw), (sg, lg)) = (x.storage_and_layout(), w.storage_and_layout(), g.storage_and_layout());
        let gain: Vec<f32> = cpu_slice::<f32>(&sw, lw)?.iter().map(|w| w + self.offset).collect();
        let h = gain.len();
        let width = if w.track_op() { h } else { 0 };
        by_dtype!(x.dtype(), self.name(), T => {
            let (xs, gs) = (cpu_slice::<T>(&sx, lx)?, cpu_slice::<T>(&sg, lg)?);
            let (dx, dw) = each_gradient(xs, gs, h, x.track_op(), width, |x, g, dx, dw| {
                if let Some(dx) = dx {
                    rms_input_gradient(x, g, &gain, self.eps, dx);
                }
                if !dw.is_empty() {
                    weight_gradient(g, x, 0.0, inverse_rms(x, self.eps), dw);
                }
            });
            let dx = dx.map(|dx| tensor_like(dx, x)).transpose()?;
            Ok((dx, if width > 0 { Some(tensor_like(dw, w)?) } else { None }))
        })
    }
}

/// Fused layer norm: x [.., h], weight `[h]` f32, bias `[h]` f32.
pub(super) struct LayerNorm {
    pub(super) eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (w, b) = (slice::<f32>(w, lw)?, slice::<f32>(b, lb)?);
        let out = by_dtype!(candle_core::backend::BackendStorage::dtype(x), self.name(), T => {
            let y = each_row::<T>(slice(x, lx)?, w.len(), |x, y| {
                let (mean, r) = mean_and_inverse_deviation(x, self.eps);
                normalise(x, mean, r, w, b, y);
            });
            <T as candle_core::WithDType>::to_cpu_storage_owned(y)
        });
        Ok((out, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let ((sx, lx), (sw, lw), (sg, lg)) = (x.storage_and_layout(), w.storage_and_layout(), g.storage_and_layout());
        let gain = cpu_slice::<f32>(&sw, lw)?;
        let h = gain.len();
        let width = if w.track_op() || b.track_op() { 2 * h } else { 0 };
        by_dtype!(x.dtype(), self.name(), T => {
            let (xs, gs) = (cpu_slice::<T>(&sx, lx)?, cpu_slice::<T>(&sg, lg)?);
            let (dx, sums) = each_gradient(xs, gs, h, x.track_op(), width, |x, g, dx, sums| {
                if let Some(dx) = dx {
                    layer_input_gradient(x, g, gain, self.eps, dx);
                }
                if let Some((dw, db)) = sums.split_at_mut_checked(h) {
                    let (mean, r) = mean_and_inverse_deviation(x, self.eps);
                    weight_gradient(g, x, mean, r, dw);
                    axpy(1.0, g, db);
                }
            });
            let dx = dx.map(|dx| tensor_like(dx, x)).transpose()?;
            let (dw, db) = sums.split_at(width / 2);
            let dw = if w.track_op() { Some(tensor_like(dw.to_vec(), w)?) } else { None };
            let db = if b.track_op() { Some(tensor_like(db.to_vec(), b)?) } else { None };
            Ok((dx, dw, db))
        })
    }
}
