//! Quantised weights on a CUDA device, made bf16.
//!
//! Equation: those of `nf4.rs` and `int8.rs`, in f32, rounded once
//! Shapes:   out [rows, columns] bf16 with rows of any stride; addresses of codes and scales as each function says
//! Cost:     one pass

use crate::cuda::rows::{spread, vectors};
use crate::cuda::{Gpu, View, launch_with};
use candle_core::Result;

/// Rows a thread.
const STEP: usize = 4;

/// out [rows, columns] <- 4-bit normal floats; `codes`: two a byte over the flattened matrix, the first in the high nibble;
/// `absmax`: f32, one for 64 weights.
///
/// # Errors
/// If the driver refuses the launch.
pub(super) fn nf4(gpu: &Gpu, codes: u64, absmax: u64, out: View, (rows, columns): (usize, usize)) -> Result<()> {
    let vector = vectors(&[out], columns) && codes.is_multiple_of(4);
    let name = if vector { "frozen_nf4" } else { "frozen_nf4_scalar" };
    let grid = spread((rows, columns), STEP)?;
    launch_with!(gpu, name, grid, codes, absmax, out.at, out.stride, rows, columns)
}

/// out [rows, columns] <- (code - zero) scale`[row]`; `codes`: a byte each, `zero` 128 for codes stored as u8 + 128 and 0 for
/// signed ones; `scales`: f32, one a row.
///
/// # Errors
/// If the driver refuses the launch.
pub(super) fn int8(
    gpu: &Gpu,
    codes: u64,
    scales: u64,
    zero: i32,
    out: View,
    (rows, columns): (usize, usize),
) -> Result<()> {
    let vector = vectors(&[out], columns) && codes.is_multiple_of(8);
    let name = if vector { "frozen_int8" } else { "frozen_int8_scalar" };
    let grid = spread((rows, columns), STEP)?;
    launch_with!(gpu, name, grid, codes, scales, zero, out.at, out.stride, rows, columns)
}
