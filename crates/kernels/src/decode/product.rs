//! A product of few rows: a phase of `cuda/kernels/decode.cu`.

use super::phase::{Phase, Work};
use crate::activation::Activation;
use crate::activation::cuda::number;
use crate::cuda::rows::aligned;
use crate::cuda::{View, address, matrix};
use crate::frozen::FrozenWeight;
use crate::part::group::Group;
use crate::part::{Gain, PartNorm};
use candle_core::{D, DType, Result, Tensor, bail};
use half::bf16;
use std::sync::Arc;

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
    /// Most ranks of a member.
    most: usize,
    /// B of all members [d_out, most], and by row the first column of u that it meets.
    b: Option<Tensor>,
    columns: Vec<f32>,
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
    pub(super) residual: u64,
    /// Where the results go once more, times the gain of the next product's norm, if it has one.
    pub(super) scaled: u64,
}

impl Product {
    /// A map with nothing beside it.
    pub(super) fn plain(weight: &Arc<FrozenWeight>, norm: Option<RowNorm>) -> Result<Option<Self>> {
        let Some(dense) = weight.as_dense().filter(|_| weight.is_bf16_on_device()) else { return Ok(None) };
        let (view, (d_out, d_in)) = (matrix(dense)?, weight.dims());
        let made = Self {
            weight: view,
            _held: vec![weight.clone()],
            d_in,
            d_out,
            norm,
            most: 0,
            b: None,
            columns: vec![0.0; d_out],
            gain: None,
            bias: None,
            a: None,
        };
        Ok(Some(made).filter(Self::fits))
    }

    /// The maps of a group with their factors among the flat parameters; None where the kernel does not take them.
    pub(super) fn of(group: &Group<'_>, flat: Option<&Tensor>, norm: Option<RowNorm>) -> Result<Option<Self>> {
        let Some(first) = group.members.first() else { return Ok(None) };
        let Some(mut made) = Self::plain(&first.weight, norm)? else { return Ok(None) };
        if flat.is_none() && group.ranks > 0 {
            bail!("decoder: a group of ranks {} without parameters", group.ranks)
        }
        let flat = flat.map(|f| f.detach().to_dtype(DType::F32)?.contiguous()).transpose()?;
        made._held = group.members.iter().map(|m| m.weight.clone()).collect();
        made.most = group.places.iter().map(|p| p.rank).max().unwrap_or(0);
        (made.d_out, made.columns) = (0, Vec::new());
        for (member, place) in group.members.iter().zip(&group.places) {
            let Some(dense) = member.weight.as_dense().filter(|_| member.weight.is_bf16_on_device()) else {
                return Ok(None);
            };
            let view = matrix(dense)?;
            let expected = made.weight.at + (made.d_out * made.weight.stride * size_of::<bf16>()) as u64;
            if (view.at, view.stride) != (expected, made.weight.stride) || !member.weight.d_out().is_multiple_of(8) {
                return Ok(None);
            }
            made.d_out += member.weight.d_out();
            made.columns.resize(made.d_out, first_column(group.ranks, made.most, place.row) as f32);
        }
        if let Some(flat) = flat {
            (made.gain, made.a) = (gains(group, &flat)?, factors(group, &flat, made.norm.as_ref())?);
            made.b = others(group, &flat, made.most)?;
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

    pub(super) fn has_norm(&self) -> bool {
        self.norm.is_some()
    }

    /// Columns of u.
    pub(super) fn ranks(&self) -> usize {
        self.a.as_ref().map_or(0, |a| a.dims()[0])
    }

    /// Address of A and the ranks of a next product; zeros if there is none.
    pub(super) fn parts(next: Option<&Self>) -> Result<(u64, usize)> {
        let Some(product) = next else { return Ok((0, 0)) };
        Ok((product.a.as_ref().map_or(Ok(0), address::<f32>)?, product.ranks()))
    }

    /// The phase before this product where it is the first: rows `ids` of a table [vocab, h] into `out`, and as it reads them into
    /// `scaled`.
    ///
    /// # Errors
    /// If the table is not contiguous bf16.
    pub(super) fn enter(&self, (table, vocab): (View, usize), out: View, scaled: u64) -> Result<Phase> {
        let (a_next, next) = Self::parts(Some(self))?;
        let gain = self.norm.as_ref().map_or(Ok(0), |n| address::<f32>(&n.gain))?;
        Ok(Phase {
            work: Work::Enter,
            x: table.at,
            x_stride: table.stride,
            vocab,
            d_in: self.d_in,
            out: out.at,
            out_stride: out.stride,
            scaled,
            a_next,
            gain,
            next,
            ..Phase::default()
        })
    }

    /// out [m, outputs] from rows x [m, d_in] in tiles that are times the gain of the norm, if there is one, and what the next
    /// product needs. The tensor is what goes with the weight: the phase reads it.
    ///
    /// # Errors
    /// If tensors are of other shapes, or the device is out of memory.
    pub(super) fn phase(&self, x: u64, out: View, what: Use, next: Option<&Self>) -> Result<(Phase, Tensor)> {
        let second = if what.gated.is_some() { self.d_out / 2 } else { 0 };
        let beside = self.beside(if second > 0 { 2 } else { 1 }, next)?;
        let (groups, record) = beside.dims2()?;
        let phase = Phase {
            work: Work::Product,
            w: self.weight.at,
            w_stride: self.weight.stride,
            beside: address::<f32>(&beside)?,
            record,
            groups,
            second,
            x,
            d_in: self.d_in,
            out: out.at,
            out_stride: out.stride,
            scaled: if next.is_some_and(Self::has_norm) { what.scaled } else { 0 },
            residual: what.residual,
            ranks: self.ranks(),
            most: self.most,
            next: next.map_or(0, Self::ranks),
            activation: what.gated.map_or(0, |a| number(a) as usize),
            norm: self.has_norm(),
            eps: self.norm.as_ref().map_or(0.0, |n| n.eps),
            ..Phase::default()
        };
        Ok((phase, beside))
    }

    /// What goes with each eight rows of W, one part of W below the other where there are two: `beside` in the kernel.
    fn beside(&self, parts: usize, next: Option<&Self>) -> Result<Tensor> {
        let (eights, device) = (self.d_out / 8, self._held[0].device());
        let groups = eights / parts;
        let columns: Vec<f32> = self.columns.iter().copied().step_by(8).collect();
        let columns = Tensor::from_vec(columns, (parts, groups), &device)?.t()?.contiguous()?;
        let mut all = vec![columns.pad_with_zeros(1, 0, 4 - parts)?];
        let b =
            self.b.as_ref().map(|b| b.reshape((eights, 8, self.most))?.transpose(1, 2)?.contiguous()).transpose()?;
        let b = b.map(|b| b.reshape((eights, 8 * self.most))).transpose()?;
        let gain = self.gain.clone().map_or_else(|| Tensor::ones(self.d_out, DType::F32, &device), Ok)?;
        let bias = self.bias.clone().map_or_else(|| Tensor::zeros(self.d_out, DType::F32, &device), Ok)?;
        let (gain, bias) = (gain.reshape((eights, 8))?, bias.reshape((eights, 8))?);
        for part in 0..parts {
            for values in b.iter().chain([&gain, &bias]) {
                all.push(values.narrow(0, part * groups, groups)?);
            }
        }
        if let Some(a) = next.and_then(|n| n.a.as_ref()) {
            let ranks = a.dim(0)?;
            all.push(a.reshape((ranks, groups, 8))?.transpose(0, 1)?.contiguous()?.reshape((groups, 8 * ranks))?);
        }
        all.push(match next.and_then(|n| n.norm.as_ref()) {
            Some(norm) => norm.gain.reshape((groups, 8))?,
            None => Tensor::zeros((groups, 8), DType::F32, &device)?,
        });
        Tensor::cat(&all, 1)?.contiguous()
    }
}

/// Where the columns of u begin that rows of B meet: all `most` of them are inside.
fn first_column(ranks: usize, most: usize, row: usize) -> usize {
    row.min(ranks - most)
}

/// B of all members one below the other [d_out, most], zeros beside those with fewer ranks.
fn others(group: &Group<'_>, flat: &Tensor, most: usize) -> Result<Option<Tensor>> {
    if most == 0 {
        return Ok(None);
    }
    let of = |(member, place): (&crate::part::Projection, &crate::part::group::Place)| -> Result<Tensor> {
        let d_out = member.weight.d_out();
        if place.rank == 0 {
            return Tensor::zeros((d_out, most), DType::F32, flat.device());
        }
        let before = place.row - first_column(group.ranks, most, place.row);
        let b = flat.narrow(0, place.b.start, d_out * place.rank)?.reshape((d_out, place.rank))?;
        b.pad_with_zeros(1, before, most - place.rank - before)
    };
    let all = group.members.iter().zip(&group.places).map(of).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&all, 0).map(Some)
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
