//! What methods share that change the weight itself instead of adding a product beside it.

use candle_core::Tensor;

use crate::Result;
use crate::low_rank::{flatten, unflatten};

/// `x` [.., d_in] times the transpose of `weight` [d_out, d_in], both on the tape, in the dtype of `x`.
///
/// # Errors
/// If shapes do not fit.
pub(crate) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, leading) = flatten(x)?;
    let y = rows.to_dtype(weight.dtype())?.matmul(&weight.t()?)?;
    Ok(unflatten(&y, &leading)?.to_dtype(x.dtype())?)
}
