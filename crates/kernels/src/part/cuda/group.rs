//! Projections that read the same rows, on a device: one product where their weights lie one after the other.

use super::{Flat, Input, Rows, exact};
use crate::cuda::factors::{self, Member};
use crate::cuda::product::{Operand, Out, multiply};
use crate::cuda::rows::Gains;
use crate::cuda::{Gpu, View, address, launch_with, matrix, rows};
use crate::frozen::{BORDER, Bordered, FrozenWeight, Whole};
use crate::part::Projection;
use crate::part::group::{Group, Place};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{DType, Result, Tensor};
use half::bf16;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

/// The gain of each member that has one.
type MemberGains = Vec<Option<Gains>>;

/// What a forward pass keeps.
pub(in crate::part) struct KeptOn {
    /// A x of all members, [n, ranks].
    inner: Option<Rows>,
    /// The sums of all members side by side, before their gains, if one has a gain.
    sums: Option<Rows>,
    /// The gains of the members that have one, and what holds those that were computed.
    gains: MemberGains,
    _held: Option<CudaSlice<f32>>,
}

impl KeptOn {
    /// The gain of a member; ones if it has none.
    pub(in crate::part) fn gain(&self, member: usize) -> Gains {
        self.gains.get(member).copied().flatten().unwrap_or(Gains { values: 0, slopes: 0 })
    }

    /// Where the gains of all members begin, if they lie one after the other.
    fn joined(&self, group: &Group<'_>) -> Option<u64> {
        let first = self.gains.first().copied().flatten()?.values;
        let follows = |(gain, at): (&Option<Gains>, usize)| gain.is_some_and(|g| g.values == value(first, at));
        self.gains.iter().zip(group.offsets()).all(follows).then_some(first)
    }
}

/// The gradient of A x, and what holds it if it is not in a border.
pub(in crate::part) struct Slopes {
    view: View,
    _held: Option<Rows>,
}

/// The weight in bf16 and what holds it.
fn dense(weight: &FrozenWeight) -> Result<(View, Tensor)> {
    let tensor = match weight.as_dense() {
        Some(w) if w.dtype() == DType::BF16 => w.clone(),
        _ => weight.dequantize(DType::BF16)?.contiguous()?,
    };
    Ok((matrix(&tensor)?, tensor))
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

    /// The weights as matrices [outputs, d_in], each with its first output: one if they lie one below the other.
    fn weights(&self) -> Result<Vec<(View, Tensor, usize, usize)>> {
        let mut all: Vec<(View, Tensor, usize, usize)> = Vec::with_capacity(self.members.len());
        for (member, first) in self.members.iter().zip(self.offsets()) {
            let (view, tensor) = dense(&member.weight)?;
            let width = member.weight.d_out();
            if let Some((before, _, _, outputs)) = all.last_mut()
                && before.stride == view.stride
                && before.at + (*outputs * view.stride * size_of::<bf16>()) as u64 == view.at
            {
                *outputs += width;
                continue;
            }
            all.push((view, tensor, first, width));
        }
        Ok(all)
    }

    /// The weights of all members in one piece, if there is room for their factors in its border.
    fn whole(&self) -> Option<&Arc<Whole>> {
        let mut found: Option<&Arc<Whole>> = None;
        for (member, at) in self.members.iter().zip(self.offsets()) {
            let FrozenWeight::Bordered(Bordered { whole, first, .. }) = &*member.weight else { return None };
            if *first != at || found.is_some_and(|found| !Arc::ptr_eq(found, whole)) {
                return None;
            }
            found = Some(whole);
        }
        found.filter(|whole| {
            whole.d_out == self.d_out() && (1..=BORDER).contains(&self.ranks) && self.members.len() <= 3
        })
    }

    /// The gains of the members that have one; those over a norm are computed, one after the other in memory.
    fn gains(&self, gpu: &Gpu, flat: &Flat) -> Result<(MemberGains, Option<CudaSlice<f32>>)> {
        let given = |at: &Range<usize>| Gains { values: flat.exact(at.start), slopes: 0 };
        let mut gains: Vec<_> = self.places.iter().map(|p| p.gain.as_ref().map(given)).collect();
        if !self.members.iter().any(Projection::needs_norms) {
            return Ok((gains, None));
        }
        let d_out = self.d_out();
        let both = gpu.alloc::<f32>(2 * d_out)?;
        let values = gpu.address(&both);
        let (mut maps, mut views, mut held): (Vec<[u64; 10]>, Vec<View>, Vec<Tensor>) = Default::default();
        for (((member, place), first), gain) in
            self.members.iter().zip(&self.places).zip(self.offsets()).zip(&mut gains)
        {
            let Some(magnitude) = place.gain.as_ref().filter(|_| member.needs_norms()) else { continue };
            let (weight, tensor) = dense(&member.weight)?;
            let (to, slopes) = (value(values, first), value(values, d_out + first));
            *gain = Some(Gains { values: to, slopes });
            let (a, b) =
                (flat.matrix(self.a.start + place.row * self.d_in, self.d_in), flat.matrix(place.b.start, place.rank));
            let (outputs, rank) = (member.weight.d_out(), place.rank);
            let sizes = [weight.stride, outputs, rank, member.scale().to_bits() as usize].map(|size| size as u64);
            let addresses = [weight.at, a.at, b.at, flat.exact(magnitude.start), to, slopes];
            maps.push(std::array::from_fn(|i| addresses.get(i).copied().unwrap_or_else(|| sizes[i - 6])));
            views.extend([weight, a]);
            held.push(tensor);
        }
        let name = match (rows::vectors(&views, self.d_in), self.places.iter().all(|p| p.rank <= 16)) {
            (true, true) => "low_rank_gains_16",
            (true, false) => "low_rank_gains",
            (false, _) => "low_rank_gains_scalar",
        };
        for three in maps.chunks(3) {
            let blocks: usize = three.iter().map(|map| map[7].div_ceil(16) as usize).sum();
            let words: Vec<u64> = three.iter().flatten().copied().chain([0; 20]).take(30).collect();
            launch_with!(gpu, name, ((blocks, 1, 1), 256, 0), words.into_boxed_slice(), self.d_in)?;
        }
        Ok((gains, Some(both)))
    }

    /// Launches `product` with the factors in the border of `whole`.
    fn with_border(
        &self,
        gpu: &Gpu,
        whole: &Whole,
        flat: &Flat,
        product: impl FnOnce(View) -> Result<()>,
    ) -> Result<()> {
        let view = matrix(&whole.values)?;
        let mut holds = whole.holds.lock().unwrap_or_else(PoisonError::into_inner);
        if *holds != flat.id {
            let mut words = [0u32; 19];
            words[0] = self.members.len() as u32;
            for (i, ((member, place), first)) in self.members.iter().zip(&self.places).zip(self.offsets()).enumerate() {
                let fields = [member.weight.d_out(), first, place.row, place.rank, place.b.start];
                fields.iter().enumerate().for_each(|(k, field)| words[1 + 3 * k + i] = *field as u32);
                words[16 + i] = member.scale().to_bits();
            }
            let (d_out, values, a) = (self.d_out(), flat.exact(0), self.a.start);
            let blocks = (self.ranks * (d_out + self.d_in)).div_ceil(1024);
            let grid = ((blocks, 1, 1), 256, 0);
            let (d_in, ranks) = (self.d_in, self.ranks);
            launch_with!(gpu, "low_rank_border", grid, view.at, view.stride, d_out, d_in, values, a, ranks, words)?;
            *holds = flat.id;
        }
        product(view)
    }

    /// Writes the outputs of all members for rows `x` [n, d_in] side by side; `residual` is added to the first one's. With `defer`
    /// the gains are left to the caller, here and on the way back; biases and a residual are not allowed then.
    pub(in crate::part) fn forward_on(
        &self,
        gpu: &Gpu,
        x: Input,
        n: usize,
        flat: &Flat,
        (residual, out): (Option<View>, View),
        defer: bool,
    ) -> Result<KeptOn> {
        let inner = (self.ranks > 0).then(|| Rows::new(gpu, n, self.ranks.next_multiple_of(8))).transpose()?;
        if let Some(inner) = &inner {
            let a = flat.matrix(self.a.start, self.d_in);
            let size = (n, self.ranks, self.d_in);
            multiply(gpu, size, plain(x.view), transposed(a), Out::Bf16(inner.view()), None, 1.0)?;
        }
        let (gains, held) = self.gains(gpu, flat)?;
        let any = gains.iter().any(Option::is_some);
        let sums = (any && !defer).then(|| Rows::new(gpu, n, self.d_out())).transpose()?;
        let to = sums.as_ref().map_or(out, Rows::view);
        let members = || self.members.iter().zip(&self.places).zip(self.offsets());
        let add = residual.filter(|_| self.members.len() == 1 && !any);
        if let (Some(whole), Some(inner)) = (self.whole().filter(|_| x.border), &inner) {
            let border = x.view.columns(self.d_in);
            rows::affine(gpu, inner.view(), None, None, None, border, (n, self.ranks))?;
            self.with_border(gpu, whole, flat, |whole| {
                let size = (n, self.d_out(), self.d_in + self.ranks);
                multiply(gpu, size, plain(x.view), transposed(whole), Out::Bf16(to), beside(add), 1.0)
            })?;
        } else {
            for (weight, _held, first, outputs) in self.weights()? {
                let size = (n, outputs, self.d_in);
                let to = Out::Bf16(to.columns(first));
                multiply(gpu, size, plain(x.view), transposed(weight), to, beside(add), 1.0)?;
            }
            for ((member, place), first) in members().filter(|((_, p), _)| p.rank > 0) {
                let Some(inner) = &inner else { break };
                let b = flat.matrix(place.b.start, place.rank);
                let (size, sum) = ((n, member.weight.d_out(), place.rank), to.columns(first));
                let u = plain(inner.view().columns(place.row));
                multiply(gpu, size, u, transposed(b), Out::Bf16(sum), beside(Some(sum)), member.scale())?;
            }
        }
        let kept = KeptOn { inner, sums, gains, _held: held };
        let plain_outputs =
            self.members.iter().all(|m| m.bias.is_none()) && (residual.is_none() || self.members.len() == 1);
        if let (Some(gain), true, true) = (kept.joined(self), plain_outputs, kept.sums.is_some()) {
            rows::affine(gpu, to, Some(gain), None, residual, out, (n, self.d_out()))?;
            return Ok(kept);
        }
        for (i, ((member, _), first)) in members().enumerate() {
            let bias = member.bias.as_ref().map(exact).transpose()?;
            let residual = residual.filter(|_| i == 0 && add.is_none());
            if kept.sums.is_none() && bias.is_none() && residual.is_none() {
                continue;
            }
            let gain = kept.gains[i].map(|g| g.values).filter(|_| !defer);
            let bias = bias.as_ref().map(address::<f32>).transpose()?;
            let size = (n, member.weight.d_out());
            rows::affine(gpu, to.columns(first), gain, bias, residual, out.columns(first), size)?;
        }
        Ok(kept)
    }

    /// Adds the gradients of B and of gains to zeros, and writes that of `x` [n, d_in] if it is wanted, for `g` of the outputs
    /// side by side. Gives the gradient of A x, for [`Self::down_on`].
    pub(in crate::part) fn backward_on(
        &self,
        gpu: &Gpu,
        (g, n): (Input, usize),
        kept: &KeptOn,
        flat: &Flat,
        (d_parameters, dx): (Option<u64>, Option<View>),
    ) -> Result<Option<Slopes>> {
        // With a gain, what reaches the sum below it is g times as much.
        let below = |sums| self.below_gains(gpu, (g.view, n), sums, kept, d_parameters);
        let scaled = kept.sums.as_ref().map(below).transpose()?;
        let below = scaled.as_ref().map_or(g, Rows::input);
        let whole = self.whole().filter(|_| below.border);
        let slopes = match (&kept.inner, whole) {
            (None, _) => None,
            (Some(_), Some(_)) => Some(Slopes { view: below.view.columns(self.d_out()), _held: scaled }),
            (Some(inner), None) => {
                let rows = Rows::new(gpu, n, inner.stride)?;
                Some(Slopes { view: rows.view(), _held: Some(rows) })
            }
        };
        if let (Some(inner), Some(slopes)) = (&kept.inner, &slopes) {
            self.thin_products(gpu, (below.view, inner.view(), slopes.view), n, flat, d_parameters)?;
        }
        let Some(dx) = dx else { return Ok(slopes) };
        if let Some(whole) = whole.filter(|_| slopes.is_some()) {
            self.with_border(gpu, whole, flat, |whole| {
                let size = (n, self.d_in, self.d_out() + self.ranks);
                multiply(gpu, size, plain(below.view), plain(whole), Out::Bf16(dx), None, 1.0)
            })?;
            return Ok(slopes);
        }
        for (i, (weight, _held, first, outputs)) in self.weights()?.into_iter().enumerate() {
            let (size, add) = ((n, self.d_in, outputs), Some(dx).filter(|_| i > 0));
            multiply(gpu, size, plain(below.view.columns(first)), plain(weight), Out::Bf16(dx), beside(add), 1.0)?;
        }
        if let Some(slopes) = &slopes {
            let (a, size) = (flat.matrix(self.a.start, self.d_in), (n, self.d_in, self.ranks));
            multiply(gpu, size, plain(slopes.view), plain(a), Out::Bf16(dx), beside(Some(dx)), 1.0)?;
        }
        Ok(slopes)
    }

    /// Writes the gradients of A x, and adds those of B to zeros, for `g` of the sums and `inner`, A x.
    fn thin_products(
        &self,
        gpu: &Gpu,
        (g, inner, slopes): (View, View, View),
        n: usize,
        flat: &Flat,
        d_parameters: Option<u64>,
    ) -> Result<()> {
        let with_factors = self.members.iter().zip(&self.places).zip(self.offsets()).filter(|((_, p), _)| p.rank > 0);
        let member = |((member, place), first): ((&Projection, &Place), usize)| Member {
            b: flat.matrix(place.b.start, place.rank).at,
            d_b: d_parameters.map(|d| value(d, place.b.start)),
            first,
            outputs: member.weight.d_out(),
            row: place.row,
            rank: place.rank,
            scale: member.scale(),
        };
        let members: Vec<Member> = with_factors.map(member).collect();
        if factors::backward(gpu, (g, inner, slopes), n, &members)? {
            return Ok(());
        }
        for m in members {
            let (b, g, to) = (View::new(m.b, m.rank), g.columns(m.first), Out::Bf16(slopes.columns(m.row)));
            multiply(gpu, (n, m.rank, m.outputs), plain(g), plain(b), to, None, m.scale)?;
            if let Some(at) = m.d_b {
                let (u, to) = (plain(inner.columns(m.row)), Out::F32 { at, stride: m.rank });
                multiply(gpu, (m.outputs, m.rank, n), transposed(g), u, to, None, m.scale)?;
            }
        }
        Ok(())
    }

    /// Adds the gradient of A to zeros, for rows `x` [n, d_in] and the gradient of A x.
    pub(in crate::part) fn down_on(
        &self,
        gpu: &Gpu,
        (x, n): (View, usize),
        slopes: Option<&Slopes>,
        d_parameters: Option<u64>,
    ) -> Result<()> {
        let (Some(slopes), Some(d)) = (slopes, d_parameters) else { return Ok(()) };
        let to = Out::F32 { at: value(d, self.a.start), stride: self.d_in };
        multiply(gpu, (self.ranks, self.d_in, n), transposed(slopes.view), plain(x), to, None, 1.0)
    }

    /// What reaches the sums for `g` of the outputs; the gradients of the gains are added to zeros.
    fn below_gains(
        &self,
        gpu: &Gpu,
        (g, n): (View, usize),
        sums: &Rows,
        kept: &KeptOn,
        d_parameters: Option<u64>,
    ) -> Result<Rows> {
        let below = Rows::bordered(gpu, n, self.d_out())?;
        let d_gain = |i: usize| {
            let at = d_parameters.zip(self.places[i].gain.as_ref());
            (self.members[i].weight.d_out(), at.map_or(0, |(d, gain)| value(d, gain.start)))
        };
        if let Some(gain) = kept.joined(self).filter(|_| self.members.len() <= 3) {
            let d_gains: Vec<_> = (0..self.members.len()).map(d_gain).collect();
            let gains = Gains { values: gain, ..kept.gain(0) };
            let size = (n, self.d_out());
            rows::affine_backward(gpu, (g, sums.view(), below.view()), gains, &d_gains, size)?;
            return Ok(below);
        }
        for (i, (member, first)) in self.members.iter().zip(self.offsets()).enumerate() {
            let (from, to, size) = (g.columns(first), below.view().columns(first), (n, member.weight.d_out()));
            if self.places[i].gain.is_none() {
                rows::affine(gpu, from, None, None, None, to, size)?;
                continue;
            }
            let views = (from, sums.view().columns(first), to);
            rows::affine_backward(gpu, views, kept.gain(i), &[d_gain(i)], size)?;
        }
        Ok(below)
    }
}
