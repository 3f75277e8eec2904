//! Root-mean-square and layer normalisation over the last dimension.
//!
//! Equation: rms:   y = x / sqrt(mean(x^2) + eps) * (offset + w)
//!           layer: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b
//! Shapes:   x [.., h], w `[h]`, b `[h]` -> y [.., h] in x's dtype; statistics in f32 (f64 for f64)
//! Source:   arXiv 1910.07467 (RMSNorm), arXiv 1607.06450 (layer norm); offset 1 is Gemma's (1 + w)
//! Cost:     one pass forward, one pass backward; nothing saved but the inputs

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
mod frozen_cuda;
pub mod reference;

use crate::fused;
use candle_core::{DType, Result, Tensor, bail};

fn check(op: &str, name: &str, x: &Tensor, vector: &Tensor) -> Result<()> {
    let h = x.dims().last().copied().unwrap_or(0);
    if h == 0 || vector.dims() != [h] {
        bail!(
            "{op}: {name} has shape {:?}, but x has shape {:?}: expected {name} [h] and x [.., h] with h > 0",
            vector.dims(),
            x.dims()
        )
    }
    if !x.dtype().is_float() {
        bail!("{op}: x is {:?}, expected a float type", x.dtype())
    }
    Ok(())
}

/// Root-mean-square normalisation: x [.., h] / rms(x) * (offset + weight `[h]`), in x's dtype.
///
/// `offset` is 0 for Llama, 1 for Gemma. The weight may be of another float type than x. Gradients for x and weight.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, offset: f64) -> Result<Tensor> {
    check("rms_norm", "weight", x, weight)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && x.dtype() == DType::BF16 && !weight.track_op() {
        let kind = cuda::Kind::Rms { offset };
        return x.contiguous()?.apply_op1(frozen_cuda::FrozenNorm {
            kind,
            weight: weight.contiguous()?,
            bias: None,
            eps,
        });
    }
    if fused(x) {
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        x.contiguous()?.apply_op2(&weight, cpu::RmsNorm { eps: eps as f32, offset: offset as f32 })
    } else {
        reference::rms_norm(x, weight, eps, offset)
    }
}

/// Layer normalisation: (x - mean) / sqrt(var + eps) * weight + bias over the last dimension of x [.., h], in x's dtype.
///
/// weight and bias `[h]` may be of another float type than x. Gradients for x, weight and bias.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check("layer_norm", "weight", x, weight)?;
    if let Some(bias) = bias {
        check("layer_norm", "bias", x, bias)?;
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && x.dtype() == DType::BF16
        && !weight.track_op()
        && bias.is_none_or(|bias| !bias.track_op())
    {
        let bias = bias.map(Tensor::contiguous).transpose()?;
        let (kind, weight) = (cuda::Kind::Layer, weight.contiguous()?);
        return x.contiguous()?.apply_op1(frozen_cuda::FrozenNorm { kind, weight, bias, eps });
    }
    if fused(x) {
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let bias = match bias {
            Some(bias) => bias.to_dtype(DType::F32)?.contiguous()?,
            None => Tensor::zeros(weight.shape(), DType::F32, x.device())?,
        };
        x.contiguous()?.apply_op3(&weight, &bias, cpu::LayerNorm { eps: eps as f32 })
    } else {
        reference::layer_norm(x, weight, bias, eps)
    }
}
