//! The product by dequantising the whole matrix: any device, f64 too.

use super::FrozenWeight;
use crate::fused;
use candle_core::{DType, Result, Tensor};

/// x [n, d_in] W^T, or x [n, d_out] W if `transposed`.
pub fn product(weight: &FrozenWeight, x: &Tensor, transposed: bool) -> Result<Tensor> {
    // candle has no half products on the CPU.
    let dtype = if fused(x) { DType::F32 } else { x.dtype() };
    let w = weight.dequantize(dtype)?.contiguous()?;
    let y = if transposed { x.to_dtype(dtype)?.matmul(&w)? } else { x.to_dtype(dtype)?.matmul(&w.t()?)? };
    y.to_dtype(x.dtype())
}
