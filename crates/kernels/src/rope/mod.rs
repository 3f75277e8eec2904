//! Rotary position embedding, half-split layout.
//!
//! Equation: y_i = x_i cos_i - x_{i+r/2} sin_i,  y_{i+r/2} = x_{i+r/2} cos_i + x_i sin_i  for i < r/2; y_j = x_j for j >= r
//! Shapes:   x [b, t, heads, d], cos and sin [b or 1, t, r/2] f32 with r <= d -> y [b, t, heads, d] in x's dtype
//! Source:   arXiv 2104.09864, in the order of dimensions of Hugging Face's `rotate_half`
//! Cost:     one pass; the backward pass is the inverse rotation of the gradient

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod reference;

use crate::fused;
use candle_core::{DType, Result, Tensor, bail};

/// Rotates the first `r` dimensions of each head of x [b, t, heads, d] by the angles whose cosines and sines are given
/// as [b or 1, t, r/2]; the other dimensions pass through. No gradient for cos and sin.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let wrong = || {
        candle_core::Error::Msg(format!(
            "rope: x {:?}, cos {:?}, sin {:?}: expected x [b, t, heads, d] and cos, sin [b or 1, t, r/2] with r <= d",
            x.dims(),
            cos.dims(),
            sin.dims()
        ))
    };
    let (b, t, _, d) = x.dims4().map_err(|_| wrong())?;
    let (cb, ct, half) = cos.dims3().map_err(|_| wrong())?;
    if sin.dims() != cos.dims() || ct != t || (cb != b && cb != 1) || 2 * half > d {
        return Err(wrong());
    }
    if !x.dtype().is_float() {
        bail!("rope: x is {:?}, expected a float type", x.dtype())
    }
    let (cos, sin) = (cos.detach(), sin.detach());
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && x.dtype() == DType::BF16 && !x.track_op() {
        return cuda::rope(x, &cos, &sin);
    }
    if fused(x) {
        let (cos, sin) = (cos.to_dtype(DType::F32)?.contiguous()?, sin.to_dtype(DType::F32)?.contiguous()?);
        x.contiguous()?.apply_op3(&cos, &sin, cpu::Rope { inverse: false })
    } else {
        reference::rope(x, &cos, &sin)
    }
}
