//! The kernels of a step one at a time, to compare each with its definition.

use super::ROWS;
use super::attend::{Cache, Heads};
use super::product::{Next, Product, RowNorm, Use};
use crate::activation::Activation;
use crate::cuda::graph::Launches;
use crate::cuda::{Gpu, View, address, matrix};
use crate::part::group::groups;
use crate::part::{PartNorm, Projection};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

/// What a product of a few rows is followed by.
#[derive(Debug, Clone, Default)]
pub struct After<'a> {
    /// Half of the sums gates the other half.
    pub gated: Option<Activation>,
    /// Added to the sums [m, d_out], bf16.
    pub residual: Option<&'a Tensor>,
    /// A map of the results and its flat parameters, whose s A y is wanted.
    pub next: Option<(&'a Projection, &'a Tensor)>,
}

/// The outputs of projections for rows x [m, d_in] side by side, bf16, m <= 32; and s A y of the map after them, f32. The flat
/// parameters are those of a part with these inputs. None where the kernels do not take them.
///
/// # Errors
/// If shapes do not fit, or the driver refuses a launch.
pub fn product(
    x: &Tensor,
    norm: Option<&PartNorm>,
    members: &[Projection],
    parameters: Option<&Tensor>,
    after: &After<'_>,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let (m, _) = x.dims2()?;
    let Some(last) = members.last() else { return Ok(None) };
    if !x.device().is_cuda() || m == 0 || m > ROWS {
        return Ok(None);
    }
    let gpu = Gpu::of(x.device())?;
    let norm = match norm.map(RowNorm::of).transpose()? {
        Some(None) => return Ok(None),
        other => other.flatten(),
    };
    let Some(made) = Product::of(&groups(members, last).0, parameters, norm)? else { return Ok(None) };
    let then = after.next.map(|(p, flat)| Product::of(&groups(std::slice::from_ref(p), p).0, Some(flat), None));
    let then = then.transpose()?.flatten();
    let outputs = if after.gated.is_some() { made.d_out() / 2 } else { made.d_out() };
    if x.dim(1)? != made.d_in() || then.as_ref().is_some_and(|t| t.d_in() != outputs) {
        bail!("product of few rows: {:?} for a weight [{}, {}]", x.dims(), made.d_out(), made.d_in())
    }
    let wide = x.to_dtype(DType::F32)?;
    let u = made.a().map(|a| wide.matmul(&a.t()?)?.contiguous()).transpose()?;
    let u_next = then.as_ref().map(|t| Tensor::zeros((m, t.ranks()), DType::F32, x.device())).transpose()?;
    let out = gpu.tensor(gpu.alloc::<bf16>(m * outputs)?, &[m, outputs]);
    let next = match (&then, &u_next) {
        (Some(product), Some(u)) => Some(Next { product, u: address::<f32>(u)? }),
        _ => None,
    };
    let what = Use { gated: after.gated, residual: after.residual.map(address::<bf16>).transpose()? };
    let u = u.as_ref().map_or(Ok(0), address::<f32>)?;
    made.launch(&Launches::now(&gpu), m, (matrix(x)?, u), matrix(&out)?, what, next.as_ref())?;
    x.device().synchronize()?;
    Ok(Some((out, u_next)))
}

/// What attention of one token a row is over: keys and values [m, capacity, kv, d] bf16, the first `length` places in use.
#[derive(Debug, Clone, Copy)]
pub struct Past<'a> {
    /// Keys, turned by their positions.
    pub keys: &'a Tensor,
    /// Values.
    pub values: &'a Tensor,
    /// Places in use.
    pub length: usize,
    /// Places at the start of each row that are padding.
    pub padding: &'a [u32],
    /// Cosines and sines [capacity, r / 2] f32.
    pub rotary: (&'a Tensor, &'a Tensor),
}

/// Attention [m, heads d] of the tokens `qkv` [m, (heads + 2 kv) d], whose keys and values are appended in place; and s A y of a
/// map after it.
///
/// # Errors
/// If the driver refuses the launch.
pub fn attention(
    qkv: &Tensor,
    heads: usize,
    past: &Past<'_>,
    (scale, window): (f64, Option<usize>),
    next: Option<(&Projection, &Tensor)>,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let ((m, _), (_, capacity, kv_heads, head_dim)) = (qkv.dims2()?, past.keys.dims4()?);
    let heads = Heads { heads, kv_heads, head_dim, scale, window };
    let then = next.map(|(p, flat)| Product::of(&groups(std::slice::from_ref(p), p).0, Some(flat), None));
    let then = then.transpose()?.flatten();
    if !qkv.device().is_cuda() || !heads.fit() || past.length >= capacity {
        return Ok(None);
    }
    let gpu = Gpu::of(qkv.device())?;
    let out = gpu.tensor(gpu.alloc::<bf16>(m * heads.heads * head_dim)?, &[m, heads.heads * head_dim]);
    let u_next = then.as_ref().map(|t| Tensor::zeros((m, t.ranks()), DType::F32, qkv.device())).transpose()?;
    let places = Tensor::from_vec(vec![past.length as u32; m], m, qkv.device())?;
    let firsts = Tensor::from_slice(past.padding, m, qkv.device())?;
    let cache = Cache {
        keys: past.keys,
        values: past.values,
        places: address::<u32>(&places)?,
        firsts: address::<u32>(&firsts)?,
        rotary: past.rotary,
    };
    let next = match (&then, &u_next) {
        (Some(product), Some(u)) => Some(Next { product, u: address::<f32>(u)? }),
        _ => None,
    };
    let rows = View::new(address::<bf16>(qkv)?, qkv.dim(1)?);
    heads.launch(&Launches::now(&gpu), m, (rows, matrix(&out)?), &cache, next.as_ref())?;
    qkv.device().synchronize()?;
    Ok(Some((out, u_next)))
}
