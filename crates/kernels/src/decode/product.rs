//! A product of few rows: `cuda/kernels/decode.cu`.

use super::ROWS;
use crate::activation::Activation;
use crate::activation::cuda::number;
use crate::cuda::graph::{Launches, SHARED};
use crate::cuda::rows::aligned;
use crate::cuda::{Arg, View, address, matrix};
use crate::frozen::FrozenWeight;
use crate::part::group::Group;
use crate::part::{Gain, PartNorm};
use candle_core::{D, DType, Result, Tensor, bail};
use half::bf16;
use std::sync::Arc;

/// Warps of a block, rows of W of a tile, and values of a row of partial sums.
const WARPS: usize = 8;
const TILE: usize = 16;
const SUMS: usize = TILE + 4;
/// Most ranks of a group.
const RANKS: usize = 256;

/// An RMS norm: offset + weight in f32, and what is added to the mean square.
#[derive(Debug, Clone)]
pub(super) struct RowNorm {
    gain: Tensor,
    eps: f64,
}

impl RowNorm {
    /// None for other norms.
    pub(super) fn of(norm: &PartNorm) -> Result<Option<Self>> {
        let PartNorm::Rms { weight, eps, offset } = norm else { return Ok(None) };
        let gain = (weight.detach().to_dtype(DType::F32)? + *offset)?.contiguous()?;
        Ok(Some(Self { gain, eps: *eps }))
    }
}

/// Maps of one input, one below the other.
#[derive(Debug)]
pub(super) struct Product {
    weight: View,
    _held: Vec<Arc<FrozenWeight>>,
    d_in: usize,
    /// Rows of W.
    d_out: usize,
    norm: Option<RowNorm>,
    /// As `Members` in the kernel: count, first rows, first columns in u, ranks, places of B in the flat parameters.
    members: [u32; 19],
    most: usize,
    flat: Option<Tensor>,
    gain: Option<Tensor>,
    bias: Option<Tensor>,
    /// The rows that make u from the input, s A or s A diag(gain of the norm) [ranks, d_in]; the norm's 1 / rms comes later.
    a: Option<Tensor>,
}

/// What a product does with its sums.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Use {
    /// Of gate and up: the first half of the sums gates the second.
    pub(super) gated: Option<Activation>,
    /// Where rows of the output's stride begin that are added.
    pub(super) residual: Option<u64>,
}

/// Where A x of the next product is added up, and its A.
#[derive(Debug, Clone, Copy)]
pub(super) struct Next<'a> {
    pub(super) product: &'a Product,
    pub(super) u: u64,
}

impl<'a> Next<'a> {
    /// Address of A, of u, and the ranks; zeros if there is none.
    pub(super) fn parts(next: Option<&Self>) -> Result<(u64, u64, usize)> {
        let Some(next) = next else { return Ok((0, 0, 0)) };
        let Some(a) = &next.product.a else { return Ok((0, 0, 0)) };
        Ok((address::<f32>(a)?, next.u, next.product.ranks()))
    }
}

impl Product {
    /// A map with nothing beside it.
    pub(super) fn plain(weight: &Arc<FrozenWeight>, norm: Option<RowNorm>) -> Result<Option<Self>> {
        let Some(dense) = weight.as_dense().filter(|_| weight.is_bf16_on_device()) else { return Ok(None) };
        let (view, (d_out, d_in)) = (matrix(dense)?, weight.dims());
        let mut members = [0; 19];
        members[0] = 1;
        let (weight, held) = (view, vec![weight.clone()]);
        let made = Self {
            weight,
            _held: held,
            d_in,
            d_out,
            norm,
            members,
            most: 0,
            flat: None,
            gain: None,
            bias: None,
            a: None,
        };
        Ok(Some(made).filter(Self::fits))
    }

    /// The maps of a group with their factors among the flat parameters; None where the kernel does not take them.
    pub(super) fn of(group: &Group<'_>, flat: Option<&Tensor>, norm: Option<RowNorm>) -> Result<Option<Self>> {
        let Some(first) = group.members.first().filter(|_| group.members.len() <= 3) else { return Ok(None) };
        let Some(mut made) = Self::plain(&first.weight, norm)? else { return Ok(None) };
        if flat.is_none() && group.ranks > 0 {
            bail!("decoder: a group of ranks {} without parameters", group.ranks)
        }
        let flat = flat.map(|f| f.detach().to_dtype(DType::F32)?.contiguous()).transpose()?;
        (made._held, made.d_out) = (group.members.iter().map(|m| m.weight.clone()).collect(), 0);
        made.members[0] = group.members.len() as u32;
        for (i, (member, place)) in group.members.iter().zip(&group.places).enumerate() {
            let Some(dense) = member.weight.as_dense().filter(|_| member.weight.is_bf16_on_device()) else {
                return Ok(None);
            };
            let view = matrix(dense)?;
            let expected = made.weight.at + (made.d_out * made.weight.stride * size_of::<bf16>()) as u64;
            if (view.at, view.stride) != (expected, made.weight.stride) {
                return Ok(None);
            }
            let fields = [made.d_out, place.row, place.rank, place.b.start];
            fields.iter().enumerate().for_each(|(k, field)| made.members[1 + 3 * k + i] = *field as u32);
            made.d_out += member.weight.d_out();
            made.most = made.most.max(place.rank);
        }
        if let Some(flat) = flat {
            (made.gain, made.a) = (gains(group, &flat)?, factors(group, &flat, made.norm.as_ref())?);
            made.flat = Some(flat);
        }
        if group.members.iter().any(|m| m.bias.is_some()) {
            let bias = |m: &crate::part::Projection| match &m.bias {
                Some(bias) => bias.detach().to_dtype(DType::F32)?.flatten_all(),
                None => Tensor::zeros(m.weight.d_out(), DType::F32, &m.weight.device()),
            };
            made.bias = Some(Tensor::cat(&group.members.iter().map(bias).collect::<Result<Vec<_>>>()?, 0)?);
        }
        Ok(Some(made).filter(Self::fits))
    }

    fn fits(&self) -> bool {
        self.d_in.is_multiple_of(8) && self.d_out.is_multiple_of(8) && aligned(&[self.weight]) && self.ranks() <= RANKS
    }

    pub(super) fn d_in(&self) -> usize {
        self.d_in
    }

    pub(super) fn d_out(&self) -> usize {
        self.d_out
    }

    /// Columns of u.
    pub(super) fn ranks(&self) -> usize {
        self.a.as_ref().map_or(0, |a| a.dims()[0])
    }

    /// The rows that make u from the input.
    pub(super) fn a(&self) -> Option<&Tensor> {
        self.a.as_ref()
    }

    /// out [m, outputs] from rows x [m, d_in] and u [m, ranks]; adds the A x of the next product to zeros.
    ///
    /// # Errors
    /// If the driver refuses the launch.
    pub(super) fn launch(
        &self,
        on: &Launches<'_>,
        m: usize,
        (x, u): (View, u64),
        out: View,
        what: Use,
        next: Option<&Next<'_>>,
    ) -> Result<()> {
        let optional = |t: &Option<Tensor>| t.as_ref().map_or(Ok(0), address::<f32>);
        let (a_next, u_next, next) = Next::parts(next)?;
        let (outputs, second) = if what.gated.is_some() { (self.d_out / 2, self.d_out / 2) } else { (self.d_out, 0) };
        let groups = m.div_ceil(8).next_power_of_two();
        debug_assert!(m <= ROWS && self.d_out.is_multiple_of(8));
        let padded = |floats: usize| floats.next_multiple_of(4);
        let floats = 8 * groups * (WARPS * SUMS + TILE)
            + ROWS
            + 4
            + padded(m * self.ranks())
            + padded(m * next)
            + TILE * next
            + padded(TILE * (self.most | 1));
        let staged = 2 * m * (self.d_in.next_multiple_of(64) + 32);
        let (stays, shared) = match 4 * floats + staged {
            all if all <= SHARED => (true, all),
            _ => (false, 4 * floats),
        };
        let name = match (groups, stays) {
            (1, true) => "decode_rows_8",
            (2, true) => "decode_rows_16",
            (_, true) => "decode_rows_32",
            (1, false) => "decode_rows_8_direct",
            (2, false) => "decode_rows_16_direct",
            _ => "decode_rows_32_direct",
        };
        // One block a processor leaves room for the next kernel's first weights.
        let tiles = outputs.div_ceil(if second > 0 { TILE / 2 } else { TILE });
        let processors = on.gpu.processors as usize;
        let most = if groups < 4 && 2 * (shared + 1024) <= SHARED { 2 * processors } else { processors };
        let blocks = if tiles <= most { tiles } else { processors };
        let eps = self.norm.as_ref().map_or(0.0, |n| n.eps);
        let norm = self.norm.as_ref().map_or(Ok(0), |n| address::<f32>(&n.gain))?;
        let args = [
            self.weight.at.into(),
            self.weight.stride.into(),
            self.d_in.into(),
            outputs.into(),
            second.into(),
            x.at.into(),
            x.stride.into(),
            norm.into(),
            eps.into(),
            u.into(),
            self.ranks().into(),
            self.most.into(),
            optional(&self.flat)?.into(),
            self.members.into(),
            optional(&self.gain)?.into(),
            optional(&self.bias)?.into(),
            what.residual.unwrap_or(0).into(),
            out.at.into(),
            out.stride.into(),
            a_next.into(),
            u_next.into(),
            next.into(),
            what.gated.map_or(0, number).into(),
            Arg::from(m),
        ];
        on.launch(name, ((blocks, 1, 1), 32 * WARPS, shared), true, &args)
    }
}

/// s A, times the gain of the norm before, of all members one below the other.
fn factors(group: &Group<'_>, flat: &Tensor, norm: Option<&RowNorm>) -> Result<Option<Tensor>> {
    if group.ranks == 0 {
        return Ok(None);
    }
    let a = flat.narrow(0, group.a.start, group.ranks * group.d_in)?.reshape((group.ranks, group.d_in))?;
    let scales: Vec<f32> = group.members.iter().flat_map(|m| std::iter::repeat_n(m.scale(), m.rank())).collect();
    let a = a.broadcast_mul(&Tensor::from_vec(scales, (group.ranks, 1), flat.device())?)?;
    Ok(Some(match norm {
        Some(norm) => a.broadcast_mul(&norm.gain)?,
        None => a,
    }))
}

/// The gains of all outputs, if a member has any; those over the norms of rows of W + s B A are computed.
fn gains(group: &Group<'_>, flat: &Tensor) -> Result<Option<Tensor>> {
    if group.places.iter().all(|p| p.gain.is_none()) {
        return Ok(None);
    }
    let gain = |(member, place): (&crate::part::Projection, &crate::part::group::Place)| -> Result<Tensor> {
        let d_out = member.weight.d_out();
        let Some(range) = &place.gain else { return Tensor::ones(d_out, DType::F32, flat.device()) };
        let values = flat.narrow(0, range.start, d_out)?;
        let Some(Gain::OverNorm { square }) = member.low_rank.as_ref().and_then(|l| l.gain.as_ref()) else {
            return Ok(values);
        };
        let (rank, s) = (place.rank, f64::from(member.scale()));
        let at = group.a.start + place.row * group.d_in;
        let a = flat.narrow(0, at, rank * group.d_in)?.reshape((rank, group.d_in))?;
        let b = flat.narrow(0, place.b.start, d_out * rank)?.reshape((d_out, rank))?;
        // |w + s b A|^2 = |w|^2 + 2 s <W A^T, b> + s^2 <b A A^T, b>.
        let cross = member.weight.forward(&a.to_dtype(DType::BF16)?)?.to_dtype(DType::F32)?.t()?.contiguous()?;
        let product = b.matmul(&a.matmul(&a.t()?)?)?;
        let beside = (((cross * (2.0 * s))? + (product * (s * s))?)? * &b)?.sum(D::Minus1)?;
        values.div(&(square.to_dtype(DType::F32)? + beside)?.sqrt()?)
    };
    let all = group.members.iter().zip(&group.places).map(gain).collect::<Result<Vec<_>>>()?;
    Ok(Some(Tensor::cat(&all, 0)?))
}
