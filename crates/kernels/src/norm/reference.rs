//! The norms in plain candle operations: any device, f64 too, differentiated by the tape.

use crate::widen;
use candle_core::{D, Result, Tensor};

/// [`super::rms_norm`] as written in the paper.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, offset: f64) -> Result<Tensor> {
    let wide = widen(x)?;
    let gain = (weight.to_dtype(wide.dtype())? + offset)?;
    let rms = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    wide.broadcast_div(&rms)?.broadcast_mul(&gain)?.to_dtype(x.dtype())
}

/// [`super::layer_norm`] as written in the paper.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let wide = widen(x)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let y = centred.broadcast_div(&deviation)?.broadcast_mul(&weight.to_dtype(wide.dtype())?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(wide.dtype())?)?,
        None => y,
    };
    y.to_dtype(x.dtype())
}
