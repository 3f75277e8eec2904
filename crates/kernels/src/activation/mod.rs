//! Activation functions, alone and as the gate of a gated feed-forward layer.
//!
//! Equation: silu x s(x); gelu x (1 + erf(x / sqrt 2)) / 2; gelu tanh form; relu; quick gelu x s(1.702 x); tanh;
//!           gated: y = act(gate) * up
//! Shapes:   any; gate and up of one shape and dtype
//! Source:   arXiv 1606.08415 (gelu), arXiv 1702.03118 (silu), arXiv 2002.05202 (gated units)
//! Cost:     one pass forward; the backward pass recomputes the activation instead of storing it

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod reference;

use crate::fused;
use candle_core::{Result, Tensor, bail};

/// A pointwise nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// x * Phi(x) with the exact normal distribution function.
    Gelu,
    /// The tanh approximation of gelu.
    GeluTanh,
    /// max(x, 0); slope 0 at 0.
    Relu,
    /// x * sigmoid(1.702 x).
    QuickGelu,
    /// Hyperbolic tangent.
    Tanh,
}

impl Activation {
    /// The activation with a Hugging Face `hidden_act` name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "relu" => Self::Relu,
            "quick_gelu" => Self::QuickGelu,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }
}

/// act(x), any shape, in x's dtype.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !x.dtype().is_float() {
        bail!("activate: x is {:?}, expected a float type", x.dtype())
    }
    if fused(x) { x.contiguous()?.apply_op1(cpu::Activate(activation)) } else { reference::activate(x, activation) }
}

/// act(gate) * up in one pass; gate and up have the same shape and dtype.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if gate.dims() != up.dims() || gate.dtype() != up.dtype() || !gate.dtype().is_float() {
        bail!(
            "gated: gate is {:?} {:?}, up is {:?} {:?}: expected one shape and one float type",
            gate.dtype(),
            gate.dims(),
            up.dtype(),
            up.dims()
        )
    }
    if fused(gate) {
        gate.contiguous()?.apply_op2(&up.contiguous()?, cpu::Gated(activation))
    } else {
        reference::gated(gate, up, activation)
    }
}
