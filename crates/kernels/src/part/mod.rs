//! A transformer block in two operations, attention and feed-forward, each one node of the tape: norm, projections with their
//! low-rank factors, rotary positions, attention or activation, and the residual sum.
//!
//! Equation: attention  y = x + O(softmax(rope(Q n) rope(K n)^T) V n),  feed-forward  y = x + D(act(G n) * (U n)),  n = norm(x);
//!           each of Q K V O G U D is P(x) = g * (W x + s B (A x)) + bias
//! Shapes:   x [b, t, h] -> y [b, t, h]; the parameters A, B, g of all projections in one flat vector, in f32
//! Source:   the reverse mode written out; what is kept is q, k, v, the attention's output and ln-sums, gate and up, and A x
//! Cost:     the products of the projections, forward once and backward once to the rows; a frozen weight has no gradient,
//!           norms and activations are computed again

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod feed_forward;
mod gain;
pub(crate) mod group;
mod node;
pub mod reference;

pub use attention::{AttentionPart, attention_part};
pub use feed_forward::{FeedForwardPart, feed_forward_part};
pub use node::{Node, Upstream};

use crate::element::{Element, zeros};
use crate::frozen::FrozenWeight;
use crate::norm::cpu::Normaliser;
use candle_core::{DType, Result, Tensor, bail};
use std::borrow::Cow;
use std::sync::Arc;

/// A low-rank product beside a frozen one; its factors are in the part's flat parameters.
#[derive(Debug, Clone)]
pub struct Factors {
    /// Rank R.
    pub rank: usize,
    /// Factor s.
    pub scale: f64,
    /// What multiplies the outputs, if anything does.
    pub gain: Option<Gain>,
}

/// A gain g `[d_out]` on the outputs of a projection.
#[derive(Debug, Clone)]
pub enum Gain {
    /// The values among the flat parameters.
    Given,
    /// The magnitudes among the flat parameters over the norms of the rows of W + s B A, which have no gradient (DoRA).
    OverNorm {
        /// |W|^2 by row, f32 `[d_out]`.
        square: Tensor,
    },
}

/// One projection.
#[derive(Debug, Clone)]
pub struct Projection {
    /// The frozen weight.
    pub weight: Arc<FrozenWeight>,
    /// The frozen bias `[d_out]`.
    pub bias: Option<Tensor>,
    /// The adapter's form.
    pub low_rank: Option<Factors>,
}

impl Projection {
    /// Whether the gain is over norms that must be computed first: done by the references, and on CUDA devices.
    pub(crate) fn needs_norms(&self) -> bool {
        self.low_rank.as_ref().is_some_and(|l| matches!(l.gain, Some(Gain::OverNorm { .. })))
    }

    pub(crate) fn rank(&self) -> usize {
        self.low_rank.as_ref().map_or(0, |l| l.rank)
    }

    pub(crate) fn scale(&self) -> f32 {
        self.low_rank.as_ref().map_or(1.0, |l| l.scale as f32)
    }
}

/// A frozen norm before a part.
#[derive(Debug, Clone)]
pub enum PartNorm {
    /// x / rms(x) * (offset + weight).
    Rms {
        /// Gain `[h]`.
        weight: Tensor,
        /// Added to the mean square.
        eps: f64,
        /// Added to the gain.
        offset: f64,
    },
    /// (x - mean) / deviation * weight + bias.
    Layer {
        /// Gain `[h]`.
        weight: Tensor,
        /// Shift `[h]`.
        bias: Tensor,
        /// Added to the variance.
        eps: f64,
    },
}

impl PartNorm {
    /// The norm of a part, if it has one, as the kernels take it.
    pub(crate) fn normaliser(norm: Option<&Self>) -> Result<Option<Normaliser>> {
        let Some(norm) = norm else { return Ok(None) };
        let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        Ok(Some(match norm {
            Self::Rms { weight, eps, offset } => {
                let gain = values(weight)?.into_iter().map(|w| w + *offset as f32).collect();
                Normaliser::Rms { gain, eps: *eps as f32 }
            }
            Self::Layer { weight, bias, eps } => {
                Normaliser::Layer { gain: values(weight)?, bias: values(bias)?, eps: *eps as f32 }
            }
        }))
    }
}

/// The rows that the projections read: those of `x` after the norm.
fn normed<'a, T: Element>(norm: Option<&Normaliser>, x: &'a [T]) -> Cow<'a, [T]> {
    norm.map_or(Cow::Borrowed(x), |norm| Cow::Owned(norm.forward(x)))
}

/// Rows of sum(widths) entries as one matrix for each width.
fn split<T: Element>(rows: &[T], widths: &[usize]) -> Vec<Vec<T>> {
    let total: usize = widths.iter().sum();
    let mut start = 0;
    let part = |width: &usize| {
        let mut out = zeros::<T>(rows.len() / total.max(1) * width);
        let work = out.len();
        crate::parallel::chunks(&mut out, *width, work, |i, to| {
            to.copy_from_slice(&rows[i * total + start..][..*width])
        });
        start += width;
        out
    };
    widths.iter().map(part).collect()
}

/// The reverse of [`split`].
fn join<T: Element>(parts: &[Vec<T>], widths: &[usize]) -> Vec<T> {
    let total: usize = widths.iter().sum();
    let mut rows = zeros::<T>(parts.iter().map(Vec::len).sum());
    let work = rows.len();
    crate::parallel::chunks(&mut rows, total, work, |i, row| {
        let mut start = 0;
        for (part, width) in parts.iter().zip(widths) {
            row[start..start + width].copy_from_slice(&part[i * width..][..*width]);
            start += width;
        }
    });
    rows
}

/// The gradient of a part's input from that of its normalised rows and, through the residual sum, of its result.
fn finish<T: Element>(d_rows: Vec<T>, norm: Option<&Normaliser>, x: &[T], residual: Option<&[T]>) -> Vec<T> {
    match (norm, residual) {
        (Some(norm), beside) => norm.backward(x, &d_rows, beside),
        (None, None) => d_rows,
        (None, Some(g)) => sum(d_rows, g),
    }
}

/// The sum of two gradients.
fn sum<T: Element>(mut a: Vec<T>, b: &[T]) -> Vec<T> {
    const PIECE: usize = 1 << 13;
    let n = a.len();
    crate::parallel::chunks(&mut a, PIECE, n, |i, a| {
        let (mut s1, mut s2) = (T::scratch(a.len()), vec![0f32; a.len()]);
        T::load(a, &mut s2);
        crate::vector::axpy(1.0, T::view(&b[i * PIECE..][..a.len()], &mut s1), &mut s2);
        T::store(&s2, a);
    });
    a
}

/// Whether parts may run fused for rows like `x`: f32, bf16 or f16 on the CPU, bf16 on a CUDA device where the crate is built for
/// it; with their parameters in f32 beside them.
pub fn is_fused(x: &Tensor, parameters: &[Tensor]) -> bool {
    let on_device = cfg!(feature = "cuda") && x.device().is_cuda() && x.dtype() == DType::BF16;
    (crate::fused(x) || on_device)
        && parameters.iter().all(|p| p.dtype() == DType::F32 && p.device().same_device(x.device()))
}

/// The flat parameters of a part without any.
fn no_parameters(x: &Tensor) -> Result<Tensor> {
    Tensor::zeros(0, DType::F32, x.device())
}

fn check(what: &str, x: &Tensor, parameters: &Tensor, needed: usize) -> Result<()> {
    x.dims3()?;
    if parameters.dims() != [needed] || !parameters.dtype().is_float() {
        bail!("{what}: parameters are {:?} {:?}, expected floats [{needed}]", parameters.dtype(), parameters.dims())
    }
    Ok(())
}
