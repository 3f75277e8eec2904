//! Softmax and log-softmax over the last dimension.
//!
//! Equation: softmax y = e^(x - m) / sum e^(x - m), m = max x;  log-softmax y = x - m - ln sum e^(x - m)
//! Shapes:   x [.., n] -> y [.., n] in x's dtype, computed in f32 (f64 for f64)
//! Cost:     two passes over each row; backward from the output alone

mod cpu;
pub mod reference;

use crate::fused;
use candle_core::{Result, Tensor, bail};

fn check(op: &str, x: &Tensor) -> Result<()> {
    if x.dims().last().copied().unwrap_or(0) == 0 || !x.dtype().is_float() {
        bail!("{op}: x is {:?} {:?}, expected a float type and shape [.., n] with n > 0", x.dtype(), x.dims())
    }
    Ok(())
}

/// Softmax over the last dimension of x [.., n].
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    check("softmax", x)?;
    if fused(x) { x.contiguous()?.apply_op1(cpu::Softmax) } else { reference::softmax(x) }
}

/// Logarithm of the softmax over the last dimension of x [.., n].
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    check("log_softmax", x)?;
    if fused(x) { x.contiguous()?.apply_op1(cpu::LogSoftmax) } else { reference::log_softmax(x) }
}
