//! Activations on a CUDA device, in bf16; the backward passes write the forward result again, so that it need not be kept.
//!
//! Equation: forward  out = act(x), or act(gate) up
//!           backward dx = d_out act'(x); d_gate = d_inner up act'(gate), d_up = d_inner act(gate)
//! Shapes:   all [rows, f] bf16; results may be written over inputs of the same kernel
//! Cost:     one pass

use super::Activation;
use crate::cuda::rows::{Gains, blocks, spread, vectors};
use crate::cuda::{Gpu, View, launch_with};
use candle_core::Result;

/// Rows a thread: of kernels that read one or two matrices, and three.
const STEP: usize = 4;
const STEP_OF_THREE: usize = 2;

/// The number of an activation in `activation.cu`.
pub(crate) fn number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::QuickGelu => 4,
        Activation::Tanh => 5,
    }
}

/// out <- act(x).
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn forward(gpu: &Gpu, activation: Activation, x: View, out: View, (rows, f): (usize, usize)) -> Result<()> {
    let name = if vectors(&[x, out], f) { "activation_forward" } else { "activation_forward_scalar" };
    let grid = spread((rows, f), STEP)?;
    launch_with!(gpu, name, grid, number(activation), x.at, x.stride, out.at, out.stride, rows, f)
}

/// dx <- the gradient of x for `d_out` of act(x), and out <- act(x).
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn backward(
    gpu: &Gpu,
    activation: Activation,
    x: View,
    d_out: View,
    dx: View,
    out: View,
    (rows, f): (usize, usize),
) -> Result<()> {
    let vector = vectors(&[x, d_out, dx, out], f);
    let name = if vector { "activation_backward" } else { "activation_backward_scalar" };
    let grid = spread((rows, f), STEP)?;
    launch_with!(
        gpu,
        name,
        grid,
        number(activation),
        x.at,
        x.stride,
        d_out.at,
        d_out.stride,
        dx.at,
        dx.stride,
        out.at,
        out.stride,
        rows,
        f
    )
}

/// out <- act(gate) up; gate and up times `gains` (addresses of f f32, 0: ones).
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn gated_forward(
    gpu: &Gpu,
    activation: Activation,
    (gate, up): (View, View),
    (gate_gain, up_gain): (u64, u64),
    out: View,
    (rows, f): (usize, usize),
) -> Result<()> {
    let name =
        if vectors(&[gate, up, out], f) { "activation_gated_forward" } else { "activation_gated_forward_scalar" };
    let grid = spread((rows, f), STEP)?;
    launch_with!(
        gpu,
        name,
        grid,
        number(activation),
        gate.at,
        gate.stride,
        up.at,
        up.stride,
        gate_gain,
        up_gain,
        out.at,
        out.stride,
        rows,
        f
    )
}

/// The gradients of gate and up for `d_inner` of act(gate) up, and inner <- act(gate) up.
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn gated_backward(
    gpu: &Gpu,
    activation: Activation,
    (gate, up): (View, View),
    d_inner: View,
    (d_gate, d_up): (View, View),
    inner: View,
    (rows, f): (usize, usize),
) -> Result<()> {
    let vector = vectors(&[gate, up, d_inner, d_gate, d_up, inner], f);
    let name = if vector { "activation_gated_backward" } else { "activation_gated_backward_scalar" };
    let grid = spread((rows, f), STEP_OF_THREE)?;
    launch_with!(
        gpu,
        name,
        grid,
        number(activation),
        gate.at,
        gate.stride,
        up.at,
        up.stride,
        d_inner.at,
        d_inner.stride,
        d_gate.at,
        d_gate.stride,
        d_up.at,
        d_up.stride,
        inner.at,
        inner.stride,
        rows,
        f
    )
}

/// As [`gated_backward`] where gate and up are sums times gains: the gradients of the sums, and those of the gains, added at the
/// addresses `d_gains` (f f32, 0: not wanted).
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn gained_backward(
    gpu: &Gpu,
    activation: Activation,
    (gate, up): (View, View),
    (gains, d_gains): ([Gains; 2], [u64; 2]),
    d_inner: View,
    (d_gate, d_up, inner): (View, View, View),
    (rows, f): (usize, usize),
) -> Result<()> {
    if rows == 0 || f == 0 {
        return Ok(());
    }
    blocks(Some(f), (rows, f))?;
    let tiles = f.div_ceil(256);
    let pieces = rows.div_ceil(8).min(1024usize.div_ceil(tiles));
    let vector = vectors(&[gate, up, d_inner, d_gate, d_up, inner], f);
    let name = if vector { "activation_gained_backward" } else { "activation_gained_backward_scalar" };
    let (grid, kind) = (((tiles, pieces, 1), 256, 0), number(activation));
    launch_with!(
        gpu,
        name,
        grid,
        kind,
        gate.at,
        gate.stride,
        up.at,
        up.stride,
        gains[0].values,
        gains[0].slopes,
        d_gains[0],
        gains[1].values,
        gains[1].slopes,
        d_gains[1],
        d_inner.at,
        d_inner.stride,
        d_gate.at,
        d_gate.stride,
        d_up.at,
        d_up.stride,
        inner.at,
        inner.stride,
        rows,
        f
    )
}
