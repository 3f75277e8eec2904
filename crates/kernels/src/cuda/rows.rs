//! Elementwise work on rows of bf16: copies by index, zeros, rounding, gains and biases.
//!
//! Equation: affine: y = sums gain + bias + residual; backward: below = g gain, d_gain += sum over rows of g sums
//! Shapes:   matrices [rows, width] bf16; gain, bias, d_gain `[width]` f32; index u32
//! Cost:     one pass over the matrices; column sums are added up in the order in which blocks finish

use super::{Gpu, Grid, View, launch_with};
use candle_core::{Result, bail};

/// Threads a block of the elementwise kernels.
const THREADS: usize = 256;
/// Rows a thread of the kernels in `rows.cu`.
const STEP: usize = 4;

/// Whether eight values of these rows are one access of 16 bytes.
pub(crate) fn vectors(views: &[View], width: usize) -> bool {
    width.is_multiple_of(8) && aligned(views)
}

/// Whether all rows begin at multiples of 16 bytes.
pub(crate) fn aligned(views: &[View]) -> bool {
    views.iter().all(|v| v.at.is_multiple_of(16) && v.stride.is_multiple_of(8))
}

/// A thread for each eight columns of `step` rows.
pub(crate) fn spread((rows, width): (usize, usize), step: usize) -> Result<Grid> {
    Ok(((blocks(rows.div_ceil(step).checked_mul(width.div_ceil(8)), (rows, width))?, 1, 1), THREADS, 0))
}

/// Blocks for so many threads, which are counted in 31 bits.
pub(crate) fn blocks(threads: Option<usize>, size: (usize, usize)) -> Result<usize> {
    match threads {
        Some(threads) if threads < 1 << 31 && size.0 < 1 << 30 && size.1 < 1 << 30 => Ok(threads.div_ceil(THREADS)),
        _ => bail!("[{}, {}] is too large for one CUDA kernel", size.0, size.1),
    }
}

/// out[i] <- x[index[i]] for n rows; `index` is the address of n u32.
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn gather(gpu: &Gpu, x: View, index: u64, out: View, (n, h): (usize, usize)) -> Result<()> {
    let name = if vectors(&[x, out], h) { "rows_gather" } else { "rows_gather_scalar" };
    launch_with!(gpu, name, spread((n, h), STEP)?, x.at, x.stride, index, out.at, out.stride, n, h)
}

/// out[index`[i]`] <- rows `[i]`, n rows of h values; `index` is the address of n different u32.
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn scatter(gpu: &Gpu, rows: View, index: u64, out: View, (n, h): (usize, usize)) -> Result<()> {
    let name = if vectors(&[rows, out], h) { "rows_scatter" } else { "rows_scatter_scalar" };
    launch_with!(gpu, name, spread((n, h), STEP)?, rows.at, rows.stride, index, out.at, out.stride, n, h)
}

/// Rounds n f32 at `from` to bf16 at `to`.
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn to_bf16(gpu: &Gpu, from: u64, to: u64, n: usize) -> Result<()> {
    let blocks = n.div_ceil(8 * STEP * THREADS);
    launch_with!(gpu, "rows_to_bf16", ((blocks, 1, 1), THREADS, 0), from, to, n as u64)
}

/// y `[i]` <- x `[i]` factors`[i]`, one factor a row; `factors` is the address of `rows` f32, and y may be x.
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn scale_rows(gpu: &Gpu, x: View, factors: u64, y: View, (rows, h): (usize, usize)) -> Result<()> {
    let name = if vectors(&[x, y], h) { "rows_scale" } else { "rows_scale_scalar" };
    launch_with!(gpu, name, spread((rows, h), STEP)?, x.at, x.stride, factors, y.at, y.stride, rows, h)
}

/// y <- sums gain + bias + residual; gain and bias are addresses of w f32, and y may be sums or residual.
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn affine(
    gpu: &Gpu,
    sums: View,
    gain: Option<u64>,
    bias: Option<u64>,
    residual: Option<View>,
    y: View,
    (rows, w): (usize, usize),
) -> Result<()> {
    let other = residual.unwrap_or(View::new(0, 0));
    let name = if vectors(&[sums, other, y], w) { "rows_affine" } else { "rows_affine_scalar" };
    let (gain, bias) = (gain.unwrap_or(0), bias.unwrap_or(0));
    let grid = spread((rows, w), STEP)?;
    launch_with!(gpu, name, grid, sums.at, sums.stride, gain, bias, other.at, other.stride, y.at, y.stride, rows, w)
}

/// Gains of columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gains {
    /// Address of the values, f32.
    pub(crate) values: u64,
    /// Address of the factors that make the gradient of a gain that of the parameter it comes from; 0: ones.
    pub(crate) slopes: u64,
}

/// below <- g gain; `sums` may be below, g or neither. The column sums of g sums, times the slopes, are added to the gradients of
/// the gains: up to three maps side by side, each with its columns and the address of f32 (0: not wanted).
///
/// # Errors
/// If there are more maps, or the driver refuses the launch.
pub(crate) fn affine_backward(
    gpu: &Gpu,
    (g, sums, below): (View, View, View),
    gain: Gains,
    d_gains: &[(usize, u64)],
    (rows, w): (usize, usize),
) -> Result<()> {
    blocks(Some(w), (rows, w))?;
    if d_gains.len() > 3 {
        bail!("{} gains side by side for a CUDA kernel that takes three", d_gains.len())
    }
    // A block has 256 columns and 8 warps of STEP rows each; about 500 blocks fill any device.
    let tiles = w.div_ceil(256);
    let pieces = rows.div_ceil(8 * STEP).min(512usize.div_ceil(tiles));
    let name = if vectors(&[g, sums, below], w) { "rows_affine_backward" } else { "rows_affine_backward_scalar" };
    let grid = ((tiles, pieces, 1), 256, 0);
    let mut words = [0u64, 0, 0, gain.slopes, w as u64, w as u64];
    let mut first = 0;
    for (i, (columns, to)) in d_gains.iter().enumerate() {
        words[i] = *to;
        if i > 0 {
            words[3 + i] = first as u64;
        }
        first += columns;
    }
    let (values, words) = (gain.values, Box::<[u64]>::from(words));
    let (a, b, c) = (g.stride, sums.stride, below.stride);
    launch_with!(gpu, name, grid, g.at, a, sums.at, b, values, below.at, c, words, rows, w)
}
