//! Single phases of a step, to compare each with its definition.

use super::ROWS;
use super::attend::Heads;
use super::phase::{Phase, Rows, Step, in_tiles};
use super::product::{Product, RowNorm, Use};
use crate::activation::Activation;
use crate::cuda::graph::Launches;
use crate::cuda::{Gpu, View, address, matrix};
use crate::part::group::groups;
use crate::part::{PartNorm, Projection};
use candle_core::cuda_backend::WrapErr;
use candle_core::{Result, Tensor, bail};
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
    if !outputs.is_multiple_of(8) {
        return Ok(None);
    }
    let out = gpu.tensor(gpu.alloc::<bf16>(m * outputs)?, &[m, outputs]);
    let [entered, scaled] = [gpu.alloc::<bf16>(m * made.d_in())?, gpu.alloc::<bf16>(in_tiles(m, made.d_in()))?];
    let ids = gpu.stream.clone_htod(&(0..m as u32).collect::<Vec<_>>()).w()?;
    let (rows, input) = (View::new(gpu.address(&entered), made.d_in()), gpu.address(&scaled));
    let enter = made.enter((matrix(x)?, m), rows, input)?;
    let residual = after.residual.map_or(Ok(0), address::<bf16>)?;
    let what = Use { gated: after.gated, residual, scaled: 0 };
    let (phase, _beside) = made.phase(input, matrix(&out)?, what, then.as_ref())?;
    let by_row = Rows { ids: gpu.address(&ids), places: 0, firsts: 0, rotary: (0, 0) };
    let u = run(&gpu, m, &[enter, phase], &by_row, then.as_ref())?;
    Ok(u.map(|u| (out, u)))
}

/// Launches phases; s A y of the product after them.
fn run(gpu: &Gpu, m: usize, phases: &[Phase], rows: &Rows, then: Option<&Product>) -> Result<Option<Option<Tensor>>> {
    let Some(step) = Step::new(gpu, m, phases, rows)? else { return Ok(None) };
    step.launch(&Launches::now(gpu))?;
    gpu.stream.synchronize().w()?;
    let Some(then) = then else { return Ok(Some(None)) };
    let u = step.added(gpu, phases.len() - 1, then.ranks())?;
    Tensor::from_vec(u, (m, then.ranks()), &candle_core::Device::Cpu).map(|u| Some(Some(u)))
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
    let places = gpu.stream.clone_htod(&vec![past.length as u32; m]).w()?;
    let firsts = gpu.stream.clone_htod(past.padding).w()?;
    let rotary = (address::<f32>(past.rotary.0)?, address::<f32>(past.rotary.1)?);
    let by_row = Rows { ids: 0, places: gpu.address(&places), firsts: gpu.address(&firsts), rotary };
    let rows = View::new(address::<bf16>(qkv)?, qkv.dim(1)?);
    let (half, on) = (past.rotary.0.dim(1)?, (m, gpu.processors as usize));
    let phase = heads.phase(on, (rows, matrix(&out)?), (past.keys, past.values), half, then.as_ref())?;
    Ok(run(&gpu, m, &[phase], &by_row, then.as_ref())?.map(|u| (out, u)))
}
