//! The parts as compositions of the other operations: any device, f64 too.

use super::{AttentionPart, FeedForwardPart, PartNorm, Projection};
use crate::activation::{activate, gated};
use crate::attention::attention;
use crate::norm::{layer_norm, rms_norm};
use crate::rope::rope;
use candle_core::{D, Result, Tensor};

fn normed(norm: Option<&PartNorm>, x: &Tensor) -> Result<Tensor> {
    match norm {
        None => Ok(x.clone()),
        Some(PartNorm::Rms { weight, eps, offset }) => rms_norm(x, weight, *eps, *offset),
        Some(PartNorm::Layer { weight, bias, eps }) => layer_norm(x, weight, Some(bias), *eps),
    }
}

/// Outputs of projections of one input; takes their factors from `parameters` at `at` on.
fn project(x: &Tensor, members: &[Projection], parameters: &Tensor, at: &mut usize) -> Result<Vec<Tensor>> {
    let (b, t, d_in) = x.dims3()?;
    let mut take = |rows: usize, columns: usize| -> Result<Tensor> {
        let part = parameters.narrow(0, *at, rows * columns)?.reshape((rows, columns))?;
        *at += rows * columns;
        part.to_dtype(if x.dtype() == candle_core::DType::F64 { x.dtype() } else { parameters.dtype() })
    };
    let a = members
        .iter()
        .map(|m| if m.rank() > 0 { take(m.rank(), d_in).map(Some) } else { Ok(None) })
        .collect::<Result<Vec<_>>>()?;
    members
        .iter()
        .zip(a)
        .map(|(member, a)| {
            let d_out = member.weight.d_out();
            let mut y = member.weight.forward(x)?;
            let mut norms = None;
            if let (Some(factors), Some(a)) = (&member.low_rank, a) {
                let factor_b = take(d_out, factors.rank)?;
                if member.needs_norms() {
                    let product = (factor_b.matmul(&a)? * factors.scale)?.detach();
                    let whole = (member.weight.dequantize(product.dtype())? + product)?;
                    norms = Some(whole.sqr()?.sum(D::Minus1)?.sqrt()?);
                }
                let rows = x.reshape((b * t, d_in))?.to_dtype(a.dtype())?;
                let product =
                    (rows.matmul(&a.t()?)? * factors.scale)?.matmul(&factor_b.t()?)?.reshape((b, t, d_out))?;
                y = (y.to_dtype(a.dtype())? + product)?;
            }
            if member.low_rank.as_ref().is_some_and(|l| l.gain.is_some()) {
                let mut gain = take(1, d_out)?.reshape(d_out)?;
                if let Some(norms) = norms {
                    gain = gain.div(&norms)?;
                }
                y = y.to_dtype(gain.dtype())?.broadcast_mul(&gain)?;
            }
            if let Some(bias) = &member.bias {
                y = y.broadcast_add(&bias.to_dtype(y.dtype())?)?;
            }
            y.to_dtype(x.dtype())
        })
        .collect()
}

/// [`super::attention_part`] by definition.
pub fn attention_part(x: &Tensor, parameters: &Tensor, part: &AttentionPart) -> Result<Tensor> {
    let (b, t, _) = x.dims3()?;
    let (h, kv, d) = (part.heads, part.kv_heads, part.head_dim);
    let mut at = 0;
    let outputs = project(&normed(part.norm.as_ref(), x)?, &part.inputs, parameters, &mut at)?;
    let [q, k, v] = match outputs.as_slice() {
        [all] => [(0, h), (h, kv), (h + kv, kv)]
            .map(|(first, count)| all.narrow(2, first * d, count * d).and_then(|part| part.contiguous())),
        [q, k, v] => [q, k, v].map(|part| Ok(part.clone())),
        other => candle_core::bail!("attention part: {} projections", other.len()),
    };
    let (mut q, mut k, v) = (q?.reshape((b, t, h, d))?, k?.reshape((b, t, kv, d))?, v?.reshape((b, t, kv, d))?);
    if let Some((cos, sin)) = &part.rotary {
        let dtype = if x.dtype() == candle_core::DType::F64 { x.dtype() } else { cos.dtype() };
        let (cos, sin) = (cos.to_dtype(dtype)?, sin.to_dtype(dtype)?);
        (q, k) = (rope(&q, &cos, &sin)?, rope(&k, &cos, &sin)?);
    }
    let out = attention(&q, &k, &v, &part.spec)?.reshape((b, t, h * d))?;
    let y = project(&out, std::slice::from_ref(&part.output), parameters, &mut at)?.remove(0);
    if part.residual { x + y } else { Ok(y) }
}

/// [`super::feed_forward_part`] by definition.
pub fn feed_forward_part(x: &Tensor, parameters: &Tensor, part: &FeedForwardPart) -> Result<Tensor> {
    let mut at = 0;
    let outputs = project(&normed(part.norm.as_ref(), x)?, &part.inputs, parameters, &mut at)?;
    let inner = match (outputs.as_slice(), part.gated) {
        ([both], true) => {
            let width = both.dim(2)? / 2;
            let half = |first: usize| both.narrow(2, first, width)?.contiguous();
            gated(&half(0)?, &half(width)?, part.activation)?
        }
        ([gate, up], _) => gated(gate, up, part.activation)?,
        ([only], false) => activate(only, part.activation)?,
        (other, _) => candle_core::bail!("feed-forward: {} projections", other.len()),
    };
    let y = project(&inner, std::slice::from_ref(&part.output), parameters, &mut at)?.remove(0);
    if part.residual { x + y } else { Ok(y) }
}
