//! Attention in plain candle operations, the whole [b, h, tq, tk] of it.

use super::mask::Rules;
use super::{AttentionSpec, Dims, Segments};
use candle_core::{D, DType, Device, Result, Tensor, bail};

/// 1 where a query sees a key, else 0: u8 [b or 1, 1, tq, tk]. Positions are compared on the host, segments on the device.
fn visible(dims: Dims, spec: &AttentionSpec, device: &Device) -> Result<Tensor> {
    let Dims { b, tq, tk, .. } = dims;
    let positions = AttentionSpec { segments: None, ..spec.clone() };
    let rules = Rules::new(dims, &positions);
    let near: Vec<u8> = (0..tq * tk).map(|at| u8::from(rules.range(at / tk).contains(&(at % tk)))).collect();
    let near = Tensor::from_vec(near, (1, 1, tq, tk), device)?;
    let Some(segments) = &spec.segments else { return Ok(near) };
    let query = Tensor::from_slice(&segments.query, (b, 1, tq, 1), device)?;
    let key = Tensor::from_slice(&segments.key, (b, 1, 1, tk), device)?;
    let same = query.broadcast_eq(&key)?.broadcast_mul(&query.ne(Segments::PADDING)?)?;
    same.broadcast_mul(&near)
}

/// [`super::attention`] by definition.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, spec: &AttentionSpec) -> Result<Tensor> {
    let Some(dims) = Dims::of(q.dims(), k.dims(), v.dims()) else {
        bail!("attention: shapes q {:?}, k {:?}, v {:?} do not fit", q.dims(), k.dims(), v.dims())
    };
    let Dims { b, tq, tk, h, kv, d, dv, .. } = dims;
    let dtype = q.dtype();
    if b * tq == 0 || tk == 0 {
        return Tensor::zeros((b, tq, h, dv), dtype, q.device());
    }
    // Products in the given type (f32 for half types on the CPU, which has no half products), softmax in f32 or f64.
    let half = matches!(dtype, DType::BF16 | DType::F16);
    let product = if half && q.device().is_cpu() { DType::F32 } else { dtype };
    let precise = if half { DType::F32 } else { dtype };
    let heads = |x: &Tensor, width: usize| -> Result<Tensor> {
        x.to_dtype(product)?
            .transpose(1, 2)?
            .unsqueeze(2)?
            .broadcast_as((b, kv, h / kv, tk, width))?
            .contiguous()?
            .reshape((b, h, tk, width))
    };
    let q = q.to_dtype(product)?.transpose(1, 2)?.contiguous()?;
    let scores = (q.matmul(&heads(k, d)?.t()?)?.to_dtype(precise)? * spec.scale)?;
    let scores = match spec.softcap {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let open = visible(dims, spec, q.device())?.to_dtype(precise)?;
    // Hidden scores sink far below any seen one; a query that sees nothing keeps a weight of exactly zero.
    let sunk = ((&open - 1.0)? * 1e30)?;
    let scores = scores.broadcast_mul(&open)?.broadcast_add(&sunk)?;
    let top = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&top)?.exp()?.broadcast_mul(&open)?;
    let total = weights.sum_keepdim(D::Minus1)?;
    let total = (&total + total.eq(0.0)?.to_dtype(precise)?)?;
    let weights = weights.broadcast_div(&total)?.to_dtype(product)?;
    weights.matmul(&heads(v, dv)?)?.transpose(1, 2)?.contiguous()?.to_dtype(dtype)
}
