//! The activations in plain candle operations.

use super::Activation;
use crate::widen;
use candle_core::{Result, Tensor};

/// sigmoid(x) = (1 + tanh(x / 2)) / 2, which neither overflows nor loses its gradient.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    ((x * 0.5)?.tanh()? + 1.0)? * 0.5
}

/// [`super::activate`] by definition.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let wide = widen(x)?;
    let y = match activation {
        Activation::Silu => (&wide * sigmoid(&wide)?)?,
        Activation::Gelu => {
            let cdf = (((&wide * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
            (&wide * cdf)?
        }
        Activation::GeluTanh => {
            let cubic = ((wide.sqr()? * 0.044715)? + 1.0)?;
            let inner = ((&wide * cubic)? * (2.0 / std::f64::consts::PI).sqrt())?;
            ((&wide * (inner.tanh()? + 1.0)?)? * 0.5)?
        }
        Activation::Relu => (&wide * wide.gt(0.0)?.to_dtype(wide.dtype())?)?,
        Activation::QuickGelu => (&wide * sigmoid(&(&wide * 1.702)?)?)?,
        Activation::Tanh => wide.tanh()?,
    };
    y.to_dtype(x.dtype())
}

/// [`super::gated`] by definition.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    (activate(&widen(gate)?, activation)? * widen(up)?)?.to_dtype(gate.dtype())
}
