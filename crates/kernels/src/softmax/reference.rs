//! Softmax in plain candle operations.

use crate::widen;
use candle_core::{D, Result, Tensor};

/// x - max(x), the maximum taken as a constant (it cancels). No rows: nothing to shift.
fn shifted(x: &Tensor) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return x * 1.0;
    }
    x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())
}

/// [`super::softmax`] by definition.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = shifted(&widen(x)?)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?.to_dtype(x.dtype())
}

/// [`super::log_softmax`] by definition.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let s = shifted(&widen(x)?)?;
    s.broadcast_sub(&s.exp()?.sum_keepdim(D::Minus1)?.log()?)?.to_dtype(x.dtype())
}
