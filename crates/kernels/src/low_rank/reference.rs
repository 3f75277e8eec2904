//! The two products apart, in plain candle operations.

use crate::frozen::FrozenWeight;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// [`super::low_rank_linear`] by definition; the low-rank product in the type of `a`.
pub fn low_rank_linear(weight: &Arc<FrozenWeight>, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let y = weight.forward(x)?;
    let d_in = weight.d_in();
    let rows = x.reshape((x.elem_count() / d_in.max(1), d_in))?.to_dtype(a.dtype())?;
    let product = (rows.matmul(&a.t()?)? * scale)?.matmul(&b.t()?)?;
    (y.to_dtype(a.dtype())? + product.reshape(y.shape())?)?.to_dtype(x.dtype())
}
