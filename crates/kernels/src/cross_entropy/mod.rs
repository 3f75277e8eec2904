//! Cross entropy of logits against label ids, one loss a row.
//!
//! Equation: loss_i = w_i (ln sum_j e^(x_ij) - x_i,label_i);  dx_ij = w_i g_i (softmax(x_i)_j - [j = label_i])
//! Shapes:   logits [n, v], labels n, weights n -> `[n]` f32 (f64 for f64 logits)
//! Cost:     two passes forward, one backward; saves one number a row. Rows of weight zero cost nothing and give zero

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod linear;
#[cfg(feature = "cuda")]
mod linear_cuda;
pub mod reference;

pub use crate::softmax::{log_softmax, softmax};

use crate::frozen::FrozenWeight;
use crate::fused;
use candle_core::{DType, Result, Tensor, bail};
use std::sync::{Arc, OnceLock};

/// Cross entropy of each row of logits [n, v] against its label, times its weight if weights are given: `[n]`, in f32
/// (f64 for f64 logits). Labels of rows with weight zero must be valid ids too.
///
/// # Errors
/// Names the row and the label if a label is not below v; names the lengths if they differ.
pub fn cross_entropy(logits: &Tensor, labels: &[u32], weights: Option<&[f32]>) -> Result<Tensor> {
    let (n, v) = match logits.dims() {
        [n, v] => (*n, *v),
        other => bail!("cross_entropy: logits have shape {other:?}, expected [n, v]"),
    };
    if !logits.dtype().is_float() {
        bail!("cross_entropy: logits are {:?}, expected a float type", logits.dtype())
    }
    if labels.len() != n {
        bail!("cross_entropy: {} labels for logits of shape [{n}, {v}], expected {n}", labels.len())
    }
    if let Some(weights) = weights
        && weights.len() != n
    {
        bail!("cross_entropy: {} weights for logits of shape [{n}, {v}], expected {n}", weights.len())
    }
    if let Some(row) = labels.iter().position(|&label| label as usize >= v) {
        bail!("cross_entropy: label {} of row {row} is not below the {v} columns of the logits", labels[row])
    }
    if fused(logits) {
        let op =
            cpu::CrossEntropy { labels: Arc::from(labels), weights: weights.map(Arc::from), log_sums: OnceLock::new() };
        logits.contiguous()?.apply_op1(op)
    } else {
        reference::cross_entropy(logits, labels, weights)
    }
}

/// Whether a CUDA device makes scores and losses of rows `x` at once.
fn runs_on_device(x: &Tensor, weight: &FrozenWeight) -> bool {
    x.device().is_cuda() && x.dtype() == DType::BF16 && weight.is_bf16_on_device()
}

/// Losses `[n]` of rows x [n, h] against `labels` through a frozen output projection `weight` [v, h]: [`cross_entropy`] of
/// x W^T, where the gradient of x is made together with the scores, so that no scores are kept.
///
/// # Errors
/// As [`cross_entropy`].
pub fn linear_cross_entropy(x: &Tensor, weight: &Arc<FrozenWeight>, labels: &[u32]) -> Result<Tensor> {
    let (v, h) = weight.dims();
    let n = match x.dims() {
        [n, d] if *d == h => *n,
        other => bail!("linear_cross_entropy: rows have shape {other:?}, the projection is [{v}, {h}]"),
    };
    if labels.len() != n {
        bail!("linear_cross_entropy: {} labels for {n} rows", labels.len())
    }
    if let Some(row) = labels.iter().position(|&label| label as usize >= v) {
        bail!("linear_cross_entropy: label {} of row {row} is not below {v}", labels[row])
    }
    let on_cpu = fused(x) && weight.device().is_cpu();
    if on_cpu || runs_on_device(x, weight) {
        let op = linear::LinearCrossEntropy::new(weight.clone(), Arc::from(labels), x.track_op());
        x.contiguous()?.apply_op1(op)
    } else {
        cross_entropy(&weight.forward(x)?, labels, None)
    }
}
