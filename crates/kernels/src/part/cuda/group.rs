//! Projections that read the same rows, on a device: one product where their weights lie one after the other.

use super::{Flat, Rows, exact};
use crate::cuda::product::{Operand, Out, multiply};
use crate::cuda::{Gpu, View, address, rows};
use crate::frozen::FrozenWeight;
use crate::part::group::Group;
use candle_core::{DType, Result, Tensor};
use half::bf16;

/// What a forward pass keeps.
pub(in crate::part) struct KeptOn {
    /// A x of all members, [n, ranks].
    inner: Option<Rows>,
    /// The sums of all members side by side, before their gains, if one has a gain.
    sums: Option<Rows>,
}

/// The weight in bf16 and what holds it.
fn dense(weight: &FrozenWeight) -> Result<(View, Tensor)> {
    let tensor = match weight {
        FrozenWeight::Dense(w) if w.dtype() == DType::BF16 => w.clone(),
        other => other.dequantize(DType::BF16)?.contiguous()?,
    };
    Ok((View::new(address::<bf16>(&tensor)?, weight.d_in()), tensor))
}

/// The address of an f32 value.
fn value(first: u64, index: usize) -> u64 {
    first + (index * size_of::<f32>()) as u64
}

fn plain(view: View) -> Operand {
    Operand { view, transposed: false }
}

fn transposed(view: View) -> Operand {
    Operand { view, transposed: true }
}

/// A sum of products that begins with nothing or with a matrix.
fn beside(view: Option<View>) -> Option<(u64, usize)> {
    view.map(|v| (v.at, v.stride))
}

impl Group<'_> {
    /// Outputs of all members side by side.
    pub(in crate::part) fn d_out(&self) -> usize {
        self.members.iter().map(|m| m.weight.d_out()).sum()
    }

    /// Whether the kernels take rows of these widths: eight values at a time.
    pub(in crate::part) fn is_aligned(&self) -> bool {
        self.d_in.is_multiple_of(8) && self.members.iter().all(|m| m.weight.d_out().is_multiple_of(8))
    }

    /// First output of each member.
    fn offsets(&self) -> impl Iterator<Item = usize> {
        self.members.iter().scan(0, |at, m| {
            let first = *at;
            *at += m.weight.d_out();
            Some(first)
        })
    }

    /// The weights as matrices [outputs, d_in], each with its first output: one if they lie one after the other.
    fn weights(&self) -> Result<Vec<(View, Tensor, usize, usize)>> {
        let mut all: Vec<(View, Tensor, usize, usize)> = Vec::with_capacity(self.members.len());
        for (member, first) in self.members.iter().zip(self.offsets()) {
            let (view, tensor) = dense(&member.weight)?;
            let width = member.weight.d_out();
            if let Some((before, _, _, outputs)) = all.last_mut()
                && before.at + (*outputs * self.d_in * size_of::<bf16>()) as u64 == view.at
            {
                *outputs += width;
                continue;
            }
            all.push((view, tensor, first, width));
        }
        Ok(all)
    }

    /// Writes the outputs of all members for rows `x` [n, d_in] side by side; `residual` is added to the first one's.
    pub(in crate::part) fn forward_on(
        &self,
        gpu: &Gpu,
        x: View,
        n: usize,
        flat: &Flat,
        (residual, out): (Option<View>, View),
    ) -> Result<KeptOn> {
        let inner = (self.ranks > 0).then(|| Rows::new(gpu, n, self.ranks.next_multiple_of(8))).transpose()?;
        if let Some(inner) = &inner {
            let a = flat.matrix(self.a.start, self.d_in);
            let size = (n, self.ranks, self.d_in);
            multiply(gpu, size, plain(x), transposed(a), Out::Bf16(inner.view()), None, 1.0)?;
        }
        let gains = self.places.iter().any(|p| p.gain.is_some());
        let sums = gains.then(|| Rows::new(gpu, n, self.d_out())).transpose()?;
        let to = sums.as_ref().map_or(out, Rows::view);
        for (weight, _held, first, outputs) in self.weights()? {
            let whole = first == 0 && outputs == self.members[0].weight.d_out();
            let add = residual.filter(|_| whole && !gains);
            let size = (n, outputs, self.d_in);
            multiply(gpu, size, plain(x), transposed(weight), Out::Bf16(to.columns(first)), beside(add), 1.0)?;
        }
        let members = || self.members.iter().zip(&self.places).zip(self.offsets());
        if let Some(inner) = &inner {
            for ((member, place), first) in members().filter(|((_, p), _)| p.rank > 0) {
                let b = flat.matrix(place.b.start, place.rank);
                let (size, sum) = ((n, member.weight.d_out(), place.rank), to.columns(first));
                let u = plain(inner.view().columns(place.row));
                multiply(gpu, size, u, transposed(b), Out::Bf16(sum), beside(Some(sum)), member.scale())?;
            }
        }
        for (i, ((member, place), first)) in members().enumerate() {
            let bias = member.bias.as_ref().map(exact).transpose()?;
            if !gains && bias.is_none() {
                continue;
            }
            let gain = place.gain.as_ref().map(|g| flat.exact(g.start));
            let bias = bias.as_ref().map(address::<f32>).transpose()?;
            let residual = residual.filter(|_| i == 0 && gains);
            let size = (n, member.weight.d_out());
            rows::affine(gpu, to.columns(first), gain, bias, residual, out.columns(first), size)?;
        }
        Ok(KeptOn { inner, sums })
    }

    /// Adds the gradients of B and of gains to zeros, and writes that of `x` [n, d_in] if it is wanted, for `g` of the outputs
    /// side by side. Gives the gradient of A x, for [`Self::down_on`].
    pub(in crate::part) fn backward_on(
        &self,
        gpu: &Gpu,
        (g, n): (View, usize),
        kept: &KeptOn,
        flat: &Flat,
        (d_parameters, dx): (Option<u64>, Option<View>),
    ) -> Result<Option<Rows>> {
        let members = || self.members.iter().zip(&self.places).zip(self.offsets());
        // With a gain, what reaches the sum below it is g times as much.
        let scaled = kept.sums.as_ref().map(|sums| self.below_gains(gpu, (g, n), sums, flat, d_parameters)).transpose()?;
        let below = scaled.as_ref().map_or(g, Rows::view);
        let d_inner = kept.inner.as_ref().map(|u| Rows::new(gpu, n, u.columns)).transpose()?;
        if let (Some(inner), Some(d_inner)) = (&kept.inner, &d_inner) {
            for ((member, place), first) in members().filter(|((_, p), _)| p.rank > 0) {
                let (d_out, rank) = (member.weight.d_out(), place.rank);
                let (b, g) = (flat.matrix(place.b.start, rank), below.columns(first));
                let to = Out::Bf16(d_inner.view().columns(place.row));
                multiply(gpu, (n, rank, d_out), plain(g), plain(b), to, None, member.scale())?;
                if let Some(d) = d_parameters {
                    let to = Out::F32 { at: value(d, place.b.start), stride: rank };
                    let u = plain(inner.view().columns(place.row));
                    multiply(gpu, (d_out, rank, n), transposed(g), u, to, None, member.scale())?;
                }
            }
        }
        let Some(dx) = dx else { return Ok(d_inner) };
        for (i, (weight, _held, first, outputs)) in self.weights()?.into_iter().enumerate() {
            let (size, add) = ((n, self.d_in, outputs), Some(dx).filter(|_| i > 0));
            multiply(gpu, size, plain(below.columns(first)), plain(weight), Out::Bf16(dx), beside(add), 1.0)?;
        }
        if let Some(d_inner) = &d_inner {
            let (a, size) = (flat.matrix(self.a.start, self.d_in), (n, self.d_in, self.ranks));
            multiply(gpu, size, plain(d_inner.view()), plain(a), Out::Bf16(dx), beside(Some(dx)), 1.0)?;
        }
        Ok(d_inner)
    }

    /// Adds the gradient of A to zeros, for rows `x` [n, d_in] and the gradient of A x.
    pub(in crate::part) fn down_on(
        &self,
        gpu: &Gpu,
        (x, n): (View, usize),
        d_inner: Option<&Rows>,
        d_parameters: Option<u64>,
    ) -> Result<()> {
        let (Some(d_inner), Some(d)) = (d_inner, d_parameters) else { return Ok(()) };
        let to = Out::F32 { at: value(d, self.a.start), stride: self.d_in };
        multiply(gpu, (self.ranks, self.d_in, n), transposed(d_inner.view()), plain(x), to, None, 1.0)
    }

    /// What reaches the sums for `g` of the outputs; the gradients of the gains are added to zeros.
    fn below_gains(
        &self,
        gpu: &Gpu,
        (g, n): (View, usize),
        sums: &Rows,
        flat: &Flat,
        d_parameters: Option<u64>,
    ) -> Result<Rows> {
        let below = Rows::new(gpu, n, self.d_out())?;
        for ((member, place), first) in self.members.iter().zip(&self.places).zip(self.offsets()) {
            let (from, to, size) = (g.columns(first), below.view().columns(first), (n, member.weight.d_out()));
            let Some(gain) = &place.gain else {
                rows::affine(gpu, from, None, None, None, to, size)?;
                continue;
            };
            let factors = flat.exact(gain.start);
            match d_parameters {
                Some(d) => {
                    let sums = sums.view().columns(first);
                    rows::affine_backward(gpu, from, sums, factors, to, value(d, gain.start), size)?;
                }
                None => rows::affine(gpu, from, Some(factors), None, None, to, size)?,
            }
        }
        Ok(below)
    }
}
