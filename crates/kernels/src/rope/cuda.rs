//! Rotary embedding on a CUDA device, in bf16 and in place.
//!
//! Equation: that of the module; the inverse is the same with the sines negated
//! Shapes:   x [b t, >= heads d] bf16; cos, sin [b or 1, t, half] f32, 2 half <= d
//! Cost:     one pass over the rotated dimensions

use crate::cuda::rows::{blocks, vectors};
use crate::cuda::{Gpu, View, address, launch_with};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

/// Heads a thread turns.
const HEADS: usize = 4;

/// [`super::rope`] of x [b, t, heads, d] off the tape.
pub(super) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, t, heads, d) = x.dims4()?;
    let y = if x.is_contiguous() { x.copy()? } else { x.contiguous()? };
    let (cos, sin) = (cos.to_dtype(DType::F32)?.contiguous()?, sin.to_dtype(DType::F32)?.contiguous()?);
    let rows = View::new(address::<bf16>(&y)?, heads * d);
    turn(&*Gpu::of(x.device())?, rows, (b * t, t, heads, d), &cos, &sin, false)?;
    Ok(y)
}

/// Turns `heads` adjacent heads of head_dim values at the start of each row by the angles of cos and sin, or back. Row
/// `i` of x is position i mod t of sequence i / t.
///
/// # Errors
/// If the shapes do not fit each other, or the driver refuses the launch.
pub(crate) fn turn(
    gpu: &Gpu,
    x: View,
    (rows, t, heads, head_dim): (usize, usize, usize, usize),
    cos: &Tensor,
    sin: &Tensor,
    inverse: bool,
) -> Result<()> {
    let (sequences, ct, half) = cos.dims3()?;
    let whole = t > 0 && rows.is_multiple_of(t) && (sequences == 1 || sequences * t == rows);
    if sin.dims() != cos.dims() || ct != t || 2 * half > head_dim || (rows > 0 && !whole) {
        bail!(
            "rope: {rows} rows of {heads} heads of {head_dim} in sequences of {t}, cos {:?}, sin {:?}: expected cos, sin \
             [b or 1, t, r/2] with r <= head_dim",
            cos.dims(),
            sin.dims()
        )
    }
    if rows == 0 || heads == 0 || half == 0 {
        return Ok(());
    }
    let (cos, sin) = (address::<f32>(cos)?, address::<f32>(sin)?);
    let vector = vectors(&[x, View::new(cos, 0), View::new(sin, 0)], half) && head_dim.is_multiple_of(8);
    let name = if vector { "rope_turn" } else { "rope_turn_scalar" };
    let threads = heads.div_ceil(HEADS).checked_mul(half.div_ceil(8)).and_then(|n| n.checked_mul(rows));
    let grid = ((blocks(threads, (rows, heads * head_dim))?, 1, 1), 256, 0);
    let sign = if inverse { -1f32 } else { 1f32 };
    launch_with!(gpu, name, grid, x.at, x.stride, cos, sin, sign, rows, sequences * t, heads, head_dim, half)
}
