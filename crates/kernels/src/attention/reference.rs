//! Attention in plain candle operations, the whole [b, h, tq, tk] of it.

use super::mask::Rules;
use super::{AttentionSpec, Dims};
use candle_core::{D, DType, Result, Tensor, bail};

/// [`super::attention`] by definition.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, spec: &AttentionSpec) -> Result<Tensor> {
    let Some(dims) = Dims::of(q.dims(), k.dims(), v.dims()) else {
        bail!("attention: shapes q {:?}, k {:?}, v {:?} do not fit", q.dims(), k.dims(), v.dims())
    };
    let Dims { b, tq, tk, h, kv, d, dv } = dims;
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
    let rules = Rules::new(dims, spec);
    let visible: Vec<u8> =
        (0..b * tq * tk).map(|at| u8::from(rules.sees(at / (tq * tk), at / tk % tq, at % tk))).collect();
    let visible = Tensor::from_vec(visible, (b, 1, tq, tk), q.device())?;
    let open = visible.to_dtype(precise)?;
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
