//! Rotary embedding in plain candle operations.

use crate::widen;
use candle_core::{Result, Tensor};

/// [`super::rope`] by slices of the head dimension.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let wide = widen(x)?;
    let (d, half) = (wide.dim(3)?, cos.dim(2)?);
    let (cos, sin) = (cos.to_dtype(wide.dtype())?.unsqueeze(2)?, sin.to_dtype(wide.dtype())?.unsqueeze(2)?);
    let (a, b) = (wide.narrow(3, 0, half)?, wide.narrow(3, half, half)?);
    let rotated_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let rotated_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let y = if d > 2 * half {
        Tensor::cat(&[rotated_a, rotated_b, wide.narrow(3, 2 * half, d - 2 * half)?], 3)?
    } else {
        Tensor::cat(&[rotated_a, rotated_b], 3)?
    };
    y.to_dtype(x.dtype())
}
