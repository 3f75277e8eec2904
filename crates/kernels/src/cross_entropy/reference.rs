//! Cross entropy in plain candle operations.

use crate::softmax::reference::log_softmax;
use crate::widen;
use candle_core::{Result, Tensor};

/// [`super::cross_entropy`] by log-softmax and a gather.
pub fn cross_entropy(logits: &Tensor, labels: &[u32], weights: Option<&[f32]>) -> Result<Tensor> {
    let wide = widen(logits)?;
    if labels.is_empty() {
        return wide.sum(1);
    }
    let device = logits.device();
    let labels = Tensor::from_slice(labels, (labels.len(), 1), device)?;
    let loss = log_softmax(&wide)?.gather(&labels, 1)?.squeeze(1)?.neg()?;
    match weights {
        Some(weights) => loss * Tensor::from_slice(weights, weights.len(), device)?.to_dtype(wide.dtype())?,
        None => Ok(loss),
    }
}
