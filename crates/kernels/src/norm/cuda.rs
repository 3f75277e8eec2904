//! The norms on a CUDA device, in bf16: a row stays in the registers of its threads, statistics recomputed in the backward pass.
//!
//! Equation: those of `cpu.rs`; the gradient of x only, plus a gradient that reaches x another way
//! Shapes:   x, y, g, beside, dx [rows, h] bf16; weight, bias `[h]` bf16 or f32
//! Cost:     one read of each input and one write of the result

use crate::cuda::rows::{blocks, vectors};
use crate::cuda::{Gpu, Grid, View, address, launch_with};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

/// Values that a thread holds.
const HELD: usize = 32;
/// Most threads a row.
const MOST: usize = 512;
/// Threads of a block with several rows.
const SMALL: usize = 128;

/// Which norm.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// x / rms(x) * (offset + weight).
    Rms {
        /// 0 for Llama, 1 for Gemma.
        offset: f64,
    },
    /// (x - mean) / deviation * weight + bias.
    Layer,
}

/// A norm with frozen weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm<'a> {
    /// Which one.
    pub(crate) kind: Kind,
    /// Gain `[h]` on the device.
    pub(crate) weight: &'a Tensor,
    /// Shift `[h]` on the device.
    pub(crate) bias: Option<&'a Tensor>,
    /// Added to the mean square.
    pub(crate) eps: f64,
}

impl Norm<'_> {
    /// Whether it is layer norm, and what is added to the weight.
    fn kind(&self) -> (bool, f64) {
        match self.kind {
            Kind::Rms { offset } => (false, offset),
            Kind::Layer => (true, 0.0),
        }
    }
}

/// A vector as the kernels read it.
struct Vector {
    at: u64,
    wide: bool,
    /// Holds the memory until the launch is in the stream.
    _tensor: Tensor,
}

impl Vector {
    fn new(tensor: &Tensor, h: usize) -> Result<Self> {
        if tensor.dims() != [h] {
            bail!("norm: a weight or bias of shape {:?} for rows of {h} values", tensor.dims())
        }
        let tensor = match tensor.dtype() {
            DType::BF16 | DType::F32 => tensor.contiguous()?,
            _ => tensor.to_dtype(DType::F32)?.contiguous()?,
        };
        let wide = tensor.dtype() == DType::F32;
        let at = if wide { address::<f32>(&tensor)? } else { address::<bf16>(&tensor)? };
        Ok(Self { at, wide, _tensor: tensor })
    }

    /// As a matrix of one row, for the question whether it begins at a multiple of 16 bytes.
    fn view(&self) -> View {
        View::new(self.at, 0)
    }
}

/// Threads a row, and blocks and threads for all.
fn shape((rows, h): (usize, usize)) -> Result<(usize, Grid)> {
    let threads = h.div_ceil(HELD);
    let group = if threads <= 32 { threads.next_power_of_two() } else { threads.next_multiple_of(32) };
    if group > MOST {
        bail!("norm: rows of {h} values, the CUDA kernel takes at most {}", MOST * HELD)
    }
    blocks(Some(0), (rows, h))?;
    let block = if group > 32 { group } else { SMALL };
    Ok((group, ((rows.div_ceil(block / group), 1, 1), block, 0)))
}

/// y <- norm(x), rows of h values; y may be x.
///
/// # Errors
/// If h is above 16384, a weight is not `[h]`, or the driver refuses the launch.
pub(crate) fn forward(gpu: &Gpu, norm: &Norm<'_>, x: View, y: View, (rows, h): (usize, usize)) -> Result<()> {
    if rows == 0 || h == 0 {
        return Ok(());
    }
    let (layer, offset) = norm.kind();
    let weight = Vector::new(norm.weight, h)?;
    let bias = norm.bias.map(|bias| Vector::new(bias, h)).transpose()?;
    let (shift, shift_wide) = bias.as_ref().map_or((View::new(0, 0), false), |b| (b.view(), b.wide));
    let (group, grid) = shape((rows, h))?;
    let name = if vectors(&[x, y, weight.view(), shift], h) { "norm_forward" } else { "norm_forward_scalar" };
    launch_with!(
        gpu,
        name,
        grid,
        x.at,
        x.stride,
        y.at,
        y.stride,
        weight.at,
        shift.at,
        weight.wide,
        shift_wide,
        offset,
        norm.eps,
        layer,
        rows,
        h,
        group
    )
}

/// dx <- beside + the gradient of x for `g` of norm(x), rows of h values; dx may be any of the inputs.
///
/// # Errors
/// As [`forward`].
pub(crate) fn backward(
    gpu: &Gpu,
    norm: &Norm<'_>,
    x: View,
    g: View,
    beside: Option<View>,
    dx: View,
    (rows, h): (usize, usize),
) -> Result<()> {
    if rows == 0 || h == 0 {
        return Ok(());
    }
    let (layer, offset) = norm.kind();
    let weight = Vector::new(norm.weight, h)?;
    let other = beside.unwrap_or(View::new(0, 0));
    let (group, grid) = shape((rows, h))?;
    let vector = vectors(&[x, g, other, dx, weight.view()], h);
    let name = if vector { "norm_backward" } else { "norm_backward_scalar" };
    launch_with!(
        gpu,
        name,
        grid,
        x.at,
        x.stride,
        g.at,
        g.stride,
        other.at,
        other.stride,
        dx.at,
        dx.stride,
        weight.at,
        weight.wide,
        offset,
        norm.eps,
        layer,
        rows,
        h,
        group
    )
}
