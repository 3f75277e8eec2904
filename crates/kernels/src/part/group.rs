//! Projections that read the same rows.
//!
//! Equation: y_i = g_i * (W_i x + B_i u_i) + bias_i, u = s A x;  d_u = s dy_i B_i, dB_i = dy_i^T u_i, dA = d_u^T x,
//!           dx = sum over i of dy_i W_i + d_u A, with g_i dy_i in place of dy_i below a gain
//! Shapes:   x [n, d_in], y_i [n, d_out_i], u [n, sum of ranks]; A of all members one below the other
//! Source:   LoRA arXiv 2106.09685 eq. 3, the gain as in DoRA arXiv 2402.09353 eq. 5; one sum for dx as one product with K grown
//!           by the ranks

use super::{Projection, gain};
use crate::frozen::{multiply_frozen, with_transposed};
use crate::product::{Multiply, Rows, Slice, Term, multiply_into, outer, outer_transposed};
use candle_core::{Result, Tensor};
use std::ops::Range;

/// Projections of one input, and where their factors lie in the flat parameters.
pub(crate) struct Group<'a> {
    pub(crate) members: &'a [Projection],
    pub(crate) d_in: usize,
    /// A of all members, one below the other: [ranks, d_in].
    pub(crate) a: Range<usize>,
    pub(crate) ranks: usize,
    pub(crate) places: Vec<Place>,
    /// Where the parameters of the group end.
    pub(crate) end: usize,
}

/// The factors of one member.
pub(crate) struct Place {
    /// First row of the member in A.
    pub(crate) row: usize,
    pub(crate) rank: usize,
    pub(crate) b: Range<usize>,
    pub(crate) gain: Option<Range<usize>>,
}

/// What a forward pass keeps.
pub(super) struct Kept<T> {
    /// s A x of all members, [n, ranks].
    inner: Vec<f32>,
    /// The sums of members with a gain, before it.
    sums: Vec<Option<Vec<T>>>,
}

/// The values of a frozen bias.
fn values(bias: &Option<Tensor>) -> Result<Option<Vec<f32>>> {
    bias.as_ref().map(|b| b.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()).transpose()
}

/// The groups of a part: its inputs, and its projection back.
pub(crate) fn groups<'a>(inputs: &'a [Projection], output: &'a Projection) -> (Group<'a>, Group<'a>) {
    let inputs = Group::new(inputs, 0);
    let output = Group::new(std::slice::from_ref(output), inputs.end);
    (inputs, output)
}

impl<'a> Group<'a> {
    /// The group whose parameters begin at `start`.
    fn new(members: &'a [Projection], start: usize) -> Self {
        let d_in = members.first().map_or(0, |m| m.weight.d_in());
        let ranks = members.iter().map(Projection::rank).sum::<usize>();
        let a = start..start + ranks * d_in;
        let (mut row, mut at) = (0, a.end);
        let places = members
            .iter()
            .map(|m| {
                let rank = m.rank();
                let b = at..at + m.weight.d_out() * rank;
                let gain = m.low_rank.as_ref().filter(|l| l.gain.is_some()).map(|_| b.end..b.end + m.weight.d_out());
                at = gain.as_ref().map_or(b.end, |g| g.end);
                row += rank;
                Place { row: row - rank, rank, b, gain }
            })
            .collect();
        Self { members, d_in, a, ranks, places, end: at }
    }

    /// Outputs of all members for rows `x` [n, d_in]; `residual` is added to the first one's.
    pub(super) fn forward<T: Multiply>(
        &self,
        x: &[T],
        n: usize,
        parameters: &[f32],
        residual: Option<&[T]>,
    ) -> Result<(Vec<Vec<T>>, Kept<T>)> {
        let mut wide = Vec::new();
        let rows = T::rows(x, &mut wide);
        let mut inner = vec![0f32; n * self.ranks];
        for (member, place) in self.members.iter().zip(&self.places).filter(|(_, p)| p.rank > 0) {
            let a = &parameters[self.a.clone()][place.row * self.d_in..][..place.rank * self.d_in];
            let a = Slice::transposed(a, self.d_in, place.rank, member.scale());
            multiply_into(n, place.rank, &[Term::new(rows, &a)], &mut inner, self.ranks, place.row);
        }
        let mut added = Vec::new();
        let rows_added = residual.map(|r| T::rows(r, &mut added));
        let (mut outputs, mut sums) = (Vec::with_capacity(self.members.len()), Vec::with_capacity(self.members.len()));
        for (i, (member, place)) in self.members.iter().zip(&self.places).enumerate() {
            let d_out = member.weight.d_out();
            let b = Slice::transposed(&parameters[place.b.clone()], place.rank, d_out, 1.0);
            let bias = values(&member.bias)?;
            let mut beside = Vec::with_capacity(3);
            if place.rank > 0 && n > 0 {
                beside.push(Term::strided(&inner[place.row..], self.ranks, &b));
            }
            let residual = residual.filter(|_| i == 0);
            if let Some(gain) = &place.gain {
                let sum = multiply_frozen::<T>(&member.weight, rows, n, &beside)?;
                outputs.push(gain::apply(&sum, &parameters[gain.clone()], bias.as_deref(), residual));
                sums.push(Some(sum));
                continue;
            }
            if let Some(bias) = &bias {
                beside.push(Term::Shift(bias));
            }
            if let (0, Some(added)) = (i, rows_added) {
                beside.push(Term::Add(added));
            }
            outputs.push(multiply_frozen::<T>(&member.weight, rows, n, &beside)?);
            sums.push(None);
        }
        Ok((outputs, Kept { inner, sums }))
    }

    /// Adds the gradients of the parameters, and gives that of `x` if `wanted`.
    pub(super) fn backward<T: Multiply>(
        &self,
        x: &[T],
        n: usize,
        gradients: &[&[T]],
        kept: &Kept<T>,
        parameters: &[f32],
        (d_parameters, wanted): (Option<&mut [f32]>, bool),
    ) -> Result<Option<Vec<T>>> {
        let mut wide: Vec<Vec<f32>> = vec![Vec::new(); self.members.len()];
        let mut d_parameters = d_parameters;
        // With a gain, what reaches the sum below it is g times as much.
        let mut scaled: Vec<Option<Vec<T>>> = Vec::with_capacity(self.members.len());
        for ((g, place), sum) in gradients.iter().zip(&self.places).zip(&kept.sums) {
            scaled.push(match (&place.gain, sum) {
                (Some(gain), Some(sum)) => {
                    let (below, d_gain) = gain::gradients(g, sum, &parameters[gain.clone()]);
                    if let Some(d) = d_parameters.as_deref_mut() {
                        d[gain.clone()].copy_from_slice(&d_gain);
                    }
                    Some(below)
                }
                _ => None,
            });
        }
        let below: Vec<&[T]> = gradients.iter().zip(&scaled).map(|(g, s)| s.as_deref().unwrap_or(g)).collect();
        let rows: Vec<Rows<'_>> = below.iter().zip(&mut wide).map(|(g, wide)| T::rows(g, wide)).collect();
        let mut d_inner = vec![0f32; n * self.ranks];
        let members = || self.members.iter().zip(&self.places);
        for ((member, place), rows) in members().zip(&rows).filter(|((_, p), _)| p.rank > 0) {
            let b = Slice::new(&parameters[place.b.clone()], member.weight.d_out(), place.rank, member.scale());
            multiply_into(n, place.rank, &[Term::new(*rows, &b)], &mut d_inner, self.ranks, place.row);
        }
        if let Some(d_parameters) = d_parameters {
            for ((member, place), g) in members().zip(&below).filter(|((_, p), _)| p.rank > 0) {
                let (d_out, rank) = (member.weight.d_out(), place.rank);
                let inner = &kept.inner[place.row.min(kept.inner.len())..];
                outer_transposed((n, rank, d_out), inner, self.ranks, g, &mut d_parameters[place.b.clone()]);
            }
            if self.ranks > 0 {
                outer((n, self.ranks, self.d_in), &d_inner, self.ranks, x, &mut d_parameters[self.a.clone()]);
            }
        }
        if !wanted {
            return Ok(None);
        }
        let a = Slice::new(&parameters[self.a.clone()], self.ranks, self.d_in, 1.0);
        let weights: Vec<_> = self.members.iter().map(|m| &*m.weight).collect();
        with_transposed(&weights, &[], &mut |operands| {
            let mut terms: Vec<Term<'_>> =
                operands.iter().zip(&rows).map(|(operand, rows)| Term::new(*rows, *operand)).collect();
            if self.ranks > 0 && n > 0 {
                terms.push(Term::new(Rows::F32(&d_inner), &a));
            }
            T::multiply(n, self.d_in, &terms)
        })
        .map(Some)
    }
}
