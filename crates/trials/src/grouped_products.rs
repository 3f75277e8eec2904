//! fused and grouped products against loops.

mod naive;

use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use espalier_adapters::by_row::ByRow;
use espalier_adapters::low_rank::LowRankView;
use espalier_adapters::{Adapter, Flow, FrozenWeight, Linear, ParameterMap};
use espalier_kernels::activation::Activation;
use espalier_kernels::low_rank::low_rank_linear;
use espalier_kernels::part::{Factors, FeedForwardPart, Gain, Projection, feed_forward_part};
use naive::{FeedForward, Map, Matrix};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::subject::{largest, values};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-12",
    title: "Fused and grouped products against loops",
    claim: "The products with low-rank factors give what loops in f64 give from the same f32 numbers; the error is the \
            largest difference over the largest value of the tensor (over a twentieth of its terms' absolute sum where they \
            cancel further than that). Random cases, ranks 1 to 512 and widths 1 to 160: one \
            map (values and gradients of rows, A and B), 1 to 1,000 adapters of different ranks in one batch of which most \
            have no rows (values), and groups of maps with one input in a feed-forward part, with gains and biases \
            (values, gradients of rows and of all factors). No rows, one row, and rows with odd strides are among them. \
            On the CPU, with the vector instructions of the machine.",
    unit: "largest relative error, f32",
    bar: 1e-5,
    bounded: 400,
    full: 10_000,
    run,
};

/// Widest map.
const WIDE: usize = 160;
const MOST_RANK: usize = 512;
const MOST_ADAPTERS: usize = 1000;
/// Values this many times smaller than their terms have cancelled.
const CANCELLED: f64 = 20.0;

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    for case in 0..scope.least {
        let rng = &mut ChaCha8Rng::seed_from_u64(case);
        let (kind, error) = match case % 3 {
            0 => ("one map", one_map(rng, tally)?),
            1 => ("many adapters", many_adapters(rng, tally)?),
            _ => ("a group of maps", group(rng, tally)?),
        };
        tally.value(format!("case {case}, {kind}"), error);
        tally.cell(kind, "worst error", error);
        tally.count(kind);
    }
    Ok(())
}

/// A number up to `most`, small ones as likely as large ones.
fn size(rng: &mut ChaCha8Rng, most: usize) -> usize {
    ((most as f64).ln() * rng.random::<f64>()).exp().round().clamp(1.0, most as f64) as usize
}

fn numbers(rng: &mut ChaCha8Rng, count: usize, std: f64) -> Vec<f32> {
    (0..count).map(|_| ((0..4).map(|_| rng.random::<f64>() - 0.5).sum::<f64>() * 1.73 * std) as f32).collect()
}

/// Takes rows of a width out of a tensor that has more.
type View = fn(&Tensor, usize, usize) -> candle_core::Result<Tensor>;

/// Rows that lie in memory in one of several ways, and where their gradient is found.
struct Given {
    var: Var,
    x: Tensor,
    /// How to take the rows' part of the gradient of `var`.
    view: View,
    offset: usize,
}

impl Given {
    fn new(rng: &mut ChaCha8Rng, rows: usize, width: usize, tally: &mut Tally) -> Result<Self> {
        let offset = rng.random_range(1..5);
        let (dims, view, how): (_, View, _) =
            // candle itself cannot copy a narrowed piece of nothing.
            match if rows == 0 { 3 } else { rng.random_range(0..4) } {
                0 => ((width, rows), |t, _, _| t.t(), "rows turned"),
                1 => ((rows, width + offset + 2), |t, offset, width| t.narrow(1, offset, width), "rows with a border"),
                2 => ((rows + offset, width), |t, offset, _| t.narrow(0, offset, t.dim(0)? - offset), "rows after others"),
                _ => ((rows, width), |t, _, _| Ok(t.clone()), "rows as they are"),
            };
        let values = numbers(rng, dims.0 * dims.1, 1.0);
        let var = Var::from_tensor(&Tensor::from_vec(values, dims, &Device::Cpu)?)?;
        let x = view(var.as_tensor(), offset, width)?;
        tally.count(how);
        tally.count(if rows == 0 { "without rows" } else { "with rows" });
        Ok(Self { var, x, view, offset })
    }

    fn matrix(&self) -> Result<Matrix> {
        Matrix::of(&self.x)
    }
}

/// Gradients of sum(y * probe) for `y`.
fn backward(y: &Tensor, probe: &Matrix) -> Result<candle_core::backprop::GradStore> {
    let probe = Tensor::from_vec(probe.values.clone(), y.shape(), &Device::Cpu)?.to_dtype(DType::F32)?;
    Ok((y * probe)?.sum_all()?.backward()?)
}

fn gradient(grads: &candle_core::backprop::GradStore, of: &Tensor) -> Result<Tensor> {
    match grads.get(of) {
        Some(found) => Ok(found.clone()),
        None => Ok(of.zeros_like()?),
    }
}

fn var(rng: &mut ChaCha8Rng, dims: (usize, usize), std: f64) -> Result<Var> {
    Ok(Var::from_tensor(&Tensor::from_vec(numbers(rng, dims.0 * dims.1, std), dims, &Device::Cpu)?)?)
}

/// Largest difference over the largest value; where the terms of all sums all but cancel, over a twentieth of their `size`.
fn error(ours: &Tensor, exact: &Matrix, size: &Matrix) -> Result<f64> {
    let ours = values(ours)?;
    if ours.len() != exact.values.len() {
        return Ok(f64::INFINITY);
    }
    let top = largest(exact.values.iter().copied()).max(largest(size.values.iter().copied()) / CANCELLED);
    if ours.is_empty() {
        return Ok(0.0);
    }
    Ok(largest(ours.iter().zip(&exact.values).map(|(a, b)| a - b)) / top)
}

fn one_map(rng: &mut ChaCha8Rng, tally: &mut Tally) -> Result<f64> {
    let (d_in, d_out, rank) = (size(rng, WIDE), size(rng, WIDE), size(rng, MOST_RANK));
    let rows = rng.random_range(0..24);
    let scale = rng.random_range(0.25..4.0);
    let given = Given::new(rng, rows, d_in, tally)?;
    let weight = var(rng, (d_out, d_in), 1.0 / (d_in as f64).sqrt())?.as_detached_tensor();
    let (a, b) =
        (var(rng, (rank, d_in), 1.0 / (d_in as f64).sqrt())?, var(rng, (d_out, rank), 1.0 / (rank as f64).sqrt())?);
    let map = Map::new(&weight, Some((a.as_tensor(), b.as_tensor(), scale)), None, None)?;
    let frozen = Arc::new(FrozenWeight::dense(weight)?);
    let y = low_rank_linear(&frozen, &given.x, a.as_tensor(), b.as_tensor(), scale)?;
    let x = given.matrix()?;
    let (sizes, x_size) = (map.absolute(), x.absolute());
    let mut worst = error(&y, &map.forward(&x), &sizes.forward(&x_size))?;
    if rows > 0 {
        let probe = Matrix {
            rows,
            columns: d_out,
            values: numbers(rng, rows * d_out, 1.0).iter().map(|v| f64::from(*v)).collect(),
        };
        let (grads, exact) = (backward(&y, &probe)?, map.backward(&x, &probe));
        let size = sizes.backward(&x_size, &probe.absolute());
        let dx = (given.view)(&gradient(&grads, given.var.as_tensor())?, given.offset, d_in)?;
        worst = worst.max(error(&dx, &exact.x, &size.x)?);
        worst = worst.max(error(&gradient(&grads, a.as_tensor())?, &exact.a, &size.a)?);
        worst = worst.max(error(&gradient(&grads, b.as_tensor())?, &exact.b, &size.b)?);
    }
    Ok(worst)
}

/// A low-rank product by itself.
#[derive(Debug)]
struct Pair {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl Adapter for Pair {
    fn low_rank(&self, _: &Arc<FrozenWeight>) -> espalier_adapters::Result<Option<LowRankView>> {
        Ok(Some(LowRankView::new(&self.a, &self.b, self.scale)))
    }

    fn parameters(&self) -> ParameterMap {
        ParameterMap::new()
    }
}

fn many_adapters(rng: &mut ChaCha8Rng, tally: &mut Tally) -> Result<f64> {
    let (d_in, d_out, count) = (size(rng, WIDE), size(rng, WIDE), size(rng, MOST_ADAPTERS));
    let (sequences, length) = (size(rng, 24), rng.random_range(0..4));
    let weight = var(rng, (d_out, d_in), 1.0 / (d_in as f64).sqrt())?.as_detached_tensor();
    let chosen: Vec<usize> = (0..sequences).map(|_| rng.random_range(0..count)).collect();
    // Only those with rows need numbers of their own; the others stand for the base, and a row that went there is seen.
    let (mut parts, mut maps) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for v in 0..count {
        let pair = chosen.contains(&v) && rng.random_range(0..8) > 0;
        if !pair {
            parts.push(None);
            maps.push(None);
            continue;
        }
        let (rank, scale) = (size(rng, MOST_RANK), rng.random_range(0.25..4.0));
        let a = var(rng, (rank, d_in), 1.0 / (d_in as f64).sqrt())?.as_detached_tensor();
        let b = var(rng, (d_out, rank), 1.0 / (rank as f64).sqrt())?.as_detached_tensor();
        maps.push(Some(Map::new(&weight, Some((&a, &b, scale)), None, None)?));
        parts.push(Some(Arc::new(Pair { a, b, scale }) as Arc<dyn Adapter>));
    }
    let base = Map::new(&weight, None, None, None)?;
    let mut linear = Linear::new("map", FrozenWeight::dense(weight)?, None, false)?;
    linear.set_adapter(Some(Arc::new(ByRow::new(parts))));
    let given = Given::new(rng, sequences * length, d_in, tally)?;
    let x = given.x.reshape((sequences, length, d_in))?;
    let y = linear.forward(&x, &Flow::by_row(chosen.clone()))?;
    let rows = given.matrix()?;
    let mut exact = Matrix { rows: sequences * length, columns: d_out, values: Vec::new() };
    let mut size = exact.clone();
    for (i, v) in chosen.iter().enumerate() {
        let own = rows.some(i * length..(i + 1) * length);
        let map = maps[*v].as_ref().unwrap_or(&base);
        exact.values.extend(map.forward(&own).values);
        size.values.extend(map.absolute().forward(&own.absolute()).values);
    }
    error(&y, &exact, &size)
}

/// A map of a group, as the part takes it and as loops do, with its A and what follows that among the flat parameters.
struct Member {
    projection: Projection,
    map: Map,
    a: Vec<f32>,
    rest: Vec<f32>,
}

fn member(rng: &mut ChaCha8Rng, d_out: usize, d_in: usize) -> Result<Member> {
    let std = 1.0 / (d_in as f64).sqrt();
    let weight = var(rng, (d_out, d_in), std)?.as_detached_tensor();
    let bias = rng.random_bool(0.3).then(|| numbers(rng, d_out, 0.5));
    let bias = bias.map(|b| Tensor::from_vec(b, d_out, &Device::Cpu)).transpose()?;
    let frozen = Arc::new(FrozenWeight::dense(weight.clone())?);
    if rng.random_bool(0.15) {
        let map = Map::new(&weight, None, None, bias.as_ref())?;
        let projection = Projection { weight: frozen, bias, low_rank: None };
        return Ok(Member { projection, map, a: Vec::new(), rest: Vec::new() });
    }
    let (rank, scale) = (size(rng, MOST_RANK), rng.random_range(0.25..2.0));
    let (a, b) = (var(rng, (rank, d_in), std)?, var(rng, (d_out, rank), 1.0 / (rank as f64).sqrt())?);
    let gain = rng.random_bool(0.3).then(|| numbers(rng, d_out, 0.3).iter().map(|g| g + 1.0).collect::<Vec<f32>>());
    let gains = gain.clone().map(|g| Tensor::from_vec(g, d_out, &Device::Cpu)).transpose()?;
    let map = Map::new(&weight, Some((a.as_tensor(), b.as_tensor(), scale)), gains.as_ref(), bias.as_ref())?;
    let low_rank = Some(Factors { rank, scale, gain: gain.is_some().then_some(Gain::Given) });
    let flat = |t: &Var| t.flatten_all()?.to_vec1::<f32>();
    let rest = flat(&b)?.into_iter().chain(gain.unwrap_or_default()).collect();
    Ok(Member { projection: Projection { weight: frozen, bias, low_rank }, map, a: flat(&a)?, rest })
}

fn group(rng: &mut ChaCha8Rng, tally: &mut Tally) -> Result<f64> {
    let (h, ff, rows) = (size(rng, WIDE), size(rng, WIDE), rng.random_range(0..16));
    let [gate, up, down] = [member(rng, ff, h)?, member(rng, ff, h)?, member(rng, h, ff)?];
    let flat: Vec<f32> =
        [&gate.a, &up.a, &gate.rest, &up.rest, &down.a, &down.rest].into_iter().flatten().copied().collect();
    let (inputs, output) = (vec![gate.projection, up.projection], down.projection);
    let maps = vec![gate.map, up.map, down.map];
    let residual = rng.random_bool(0.5);
    let part =
        Arc::new(FeedForwardPart { norm: None, inputs, output, activation: Activation::Silu, gated: true, residual });
    let parameters = Var::from_tensor(&Tensor::from_slice(&flat, flat.len(), &Device::Cpu)?)?;
    let given = Given::new(rng, rows, h, tally)?;
    let y = feed_forward_part(&given.x.unsqueeze(0)?, Some(parameters.as_tensor()), &part)?;
    let exact = FeedForward { maps, residual };
    let x = given.matrix()?;
    let probe = numbers(rng, rows * h, 1.0).iter().map(|v| f64::from(*v)).collect();
    let probe = Matrix { rows, columns: h, values: probe };
    let (y_size, dx_size, sizes) = exact.sizes(&x, &probe);
    let mut worst = error(&y, &exact.forward(&x), &y_size)?;
    if rows > 0 {
        let (grads, (dx, d_parameters)) = (backward(&y, &probe)?, exact.backward(&x, &probe));
        let ours = (given.view)(&gradient(&grads, given.var.as_tensor())?, given.offset, h)?;
        worst = worst.max(error(&ours, &dx, &dx_size)?);
        let (ours, mut at) = (gradient(&grads, parameters.as_tensor())?, 0);
        for (wanted, size) in d_parameters.iter().zip(&sizes) {
            let own = ours.narrow(0, at, wanted.values.len())?;
            worst = worst.max(error(&own, wanted, size)?);
            at += wanted.values.len();
        }
        anyhow::ensure!(at == flat.len(), "{at} of {} parameters", flat.len());
    }
    Ok(worst)
}
