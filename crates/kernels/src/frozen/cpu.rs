//! Products with a frozen matrix on the CPU.
//!
//! Few rows (decoding): one dot product per output row, straight from the stored form. Else a product whose panels are
//! unpacked from the stored form as they are needed, so that the matrix never exists in another type as a whole.

use super::gguf::Blocks;
use super::int8::Int8;
use super::nf4::Nf4;
use super::{Bordered, FrozenWeight};
use crate::element::{Element, by_dtype, cpu_slice, slice};
use crate::parallel::{self, chunks};
use crate::product::{
    Beside, FEW, Multiply, Right, Rows, Term, dots, dots_beside, panel_width, panels_of, scatter, scatter_pairs,
    transpose, transpose_pairs,
};
use crate::vector::to_bf16;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// x W^T or, transposed, x W.
pub(super) struct FrozenProduct {
    pub(super) weight: Arc<FrozenWeight>,
    pub(super) transposed: bool,
}

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        if self.transposed { "frozen-transposed" } else { "frozen" }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = layout.shape().dims2()?.0;
        let (d_out, d_in) = self.weight.dims();
        let out = by_dtype!(x.dtype(), self.name(), T => {
            let mut wide = Vec::new();
            let rows = T::rows(slice(x, layout)?, &mut wide);
            let y = match self.transposed {
                true => with_operand(&self.weight, true, |w| T::multiply(n, d_in, &[Term::new(rows, w)]))?,
                false => multiply::<T>(&self.weight, rows, n, &[])?,
            };
            <T as WithDType>::to_cpu_storage_owned(y)
        });
        Ok((out, Shape::from((n, if self.transposed { d_in } else { d_out }))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        super::dense_cuda::product(&self.weight, x, layout, self.transposed)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let op = FrozenProduct { weight: self.weight.clone(), transposed: !self.transposed };
        Ok(Some(g.contiguous()?.apply_op1(op)?))
    }
}

/// x W^T for rows x [n, d_in], and the terms of `beside` added to it.
pub(crate) fn multiply<T: Multiply>(
    weight: &FrozenWeight,
    x: Rows<'_>,
    n: usize,
    beside: &[Term<'_>],
) -> Result<Vec<T>> {
    let (d_out, d_in) = weight.dims();
    with_source(weight, |source| {
        if n <= FEW {
            let mut y = few(source, &x.widened(), n, d_out, d_in);
            if !beside.is_empty() {
                crate::vector::axpy(1.0, &f32::multiply(n, d_out, beside), &mut y);
            }
            return T::narrowed(y);
        }
        let operand = Operand { source, d_out, d_in, transposed: false };
        let terms: Vec<Term<'_>> = [Term::new(x, &operand)].into_iter().chain(beside.iter().copied()).collect();
        T::multiply(n, d_out, &terms)
    })
}

/// `dots(first, x, beside, y)` writes y [rows, n] for the rows of a weight from `first` on, input rows x [n, d_in] and what is
/// beside each of them (rows of B from `first` on).
pub(crate) type Dots<'a> = dyn Fn(usize, &[f32], &[Beside<'_>], &mut [f32]) + Sync + 'a;

/// Runs `f` on the dot products of each of `weights`.
pub(crate) fn with_dots<R>(
    weights: &[&FrozenWeight],
    before: &[&Dots<'_>],
    f: &mut dyn FnMut(&[&Dots<'_>]) -> R,
) -> Result<R> {
    let Some((weight, rest)) = weights.split_first() else { return Ok(f(before)) };
    let d_in = weight.dims().1;
    with_source(weight, |source| {
        let dots =
            |first: usize, x: &[f32], beside: &[Beside<'_>], y: &mut [f32]| source.dots(d_in, first, x, beside, y);
        let all: Vec<&Dots<'_>> = before.iter().copied().chain([&dots as &Dots<'_>]).collect();
        with_dots(rest, &all, f)
    })?
}

/// Runs `f` on W^T [d_in, d_out], or on W [d_out, d_in] if `transposed`, as a right operand.
pub(crate) fn with_operand<R>(weight: &FrozenWeight, transposed: bool, f: impl FnOnce(&dyn Right) -> R) -> Result<R> {
    let (d_out, d_in) = weight.dims();
    with_source(weight, |source| f(&Operand { source, d_out, d_in, transposed }))
}

/// Runs `f` on W [d_out, d_in] of each of `weights` as right operands.
pub(crate) fn with_transposed<R>(
    weights: &[&FrozenWeight],
    before: &[&dyn Right],
    f: &mut dyn FnMut(&[&dyn Right]) -> R,
) -> Result<R> {
    let Some((weight, rest)) = weights.split_first() else { return Ok(f(before)) };
    let (d_out, d_in) = weight.dims();
    with_source(weight, |source| {
        let operand = Operand { source, d_out, d_in, transposed: true };
        let operands: Vec<&dyn Right> = before.iter().copied().chain([&operand as &dyn Right]).collect();
        with_transposed(rest, &operands, f)
    })?
}

/// A stored weight as the right operand of a product: W^T [d_in, d_out], or W [d_out, d_in] if `transposed`.
struct Operand<'a> {
    source: &'a Source<'a>,
    d_out: usize,
    d_in: usize,
    transposed: bool,
}

impl Operand<'_> {
    /// Rows `first..first + count` of the weight in f32, of columns `start..start + len`.
    fn rows(&self, first: usize, count: usize, (start, len): (usize, usize)) -> Vec<f32> {
        let mut rows = vec![0f32; count * len];
        for (r, row) in rows.chunks_exact_mut(len).enumerate() {
            self.source.load(self.d_in, first + r, start, row);
        }
        rows
    }
}

impl Right for Operand<'_> {
    fn k(&self) -> usize {
        if self.transposed { self.d_out } else { self.d_in }
    }

    fn n(&self) -> usize {
        if self.transposed { self.d_in } else { self.d_out }
    }

    fn strip(&self) -> usize {
        match (self.transposed, self.source) {
            // Columns across many rows: whole blocks of the stored form at once.
            (true, Source::Nf4(_) | Source::Int8(_) | Source::Gguf(_)) => 256,
            _ => 0,
        }
    }

    fn pack(&self, first: usize, columns: usize, mut dst: &mut [f32]) {
        let (k, d_in) = (self.k(), self.d_in);
        if self.transposed {
            let mut scratch = vec![0f32; columns];
            for p in 0..k {
                if let Source::F32(w) = self.source {
                    scatter(&w[p * d_in + first..][..columns], k, p, dst);
                } else {
                    self.source.load(d_in, p, first, &mut scratch);
                    scatter(&scratch, k, p, dst);
                }
            }
            return;
        }
        for (at, width) in panels_of(columns) {
            let (panel, rest) = std::mem::take(&mut dst).split_at_mut(k * width);
            dst = rest;
            let (start, here) = (first + at, panel_width().min(columns - at));
            if let Source::F32(w) = self.source {
                let rows: Vec<&[f32]> = w[start * d_in..].chunks(d_in).take(here).collect();
                transpose(&rows, k, width, panel);
            } else {
                let values = self.rows(start, here, (0, d_in));
                let rows: Vec<&[f32]> = values.chunks(d_in).collect();
                transpose(&rows, k, width, panel);
            }
        }
    }

    fn pack_pairs(&self, first: usize, columns: usize, mut dst: &mut [u16]) {
        let (k, d_in) = (self.k(), self.d_in);
        let direct: Option<&[u16]> = match self.source {
            Source::Bf16(w) => Some(w.reinterpret_cast()),
            _ => None,
        };
        if self.transposed {
            let mut scratch = [vec![0u16; columns], vec![0u16; columns]];
            let mut wide = vec![0f32; columns];
            for p in (0..k).step_by(2) {
                if let Some(w) = direct {
                    let row = |p: usize| &w[p * d_in + first..][..columns];
                    scatter_pairs(row(p), (p + 1 < k).then(|| row(p + 1)), k, p, dst);
                    continue;
                }
                for (i, row) in scratch.iter_mut().enumerate().take(k - p) {
                    self.source.load(d_in, p + i, first, &mut wide);
                    to_bf16(&wide, row);
                }
                let [even, odd] = &scratch;
                scatter_pairs(even, (p + 1 < k).then_some(odd), k, p, dst);
            }
            return;
        }
        for (at, width) in panels_of(columns) {
            let (panel, rest) = std::mem::take(&mut dst).split_at_mut(k.div_ceil(2) * 2 * width);
            dst = rest;
            let (start, here) = (first + at, panel_width().min(columns - at));
            if let Some(w) = direct {
                let rows: Vec<&[u16]> = w[start * d_in..].chunks(d_in).take(here).collect();
                transpose_pairs(&rows, k, width, panel);
            } else {
                let values = self.rows(start, here, (0, d_in));
                let mut halves = vec![0u16; values.len()];
                to_bf16(&values, &mut halves);
                let rows: Vec<&[u16]> = halves.chunks(d_in).collect();
                transpose_pairs(&rows, k, width, panel);
            }
        }
    }
}

/// The stored weights, readable in runs of a row.
enum Source<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Nf4(&'a Nf4),
    Int8(&'a Int8),
    Gguf(Blocks<'a>),
}

fn with_source<R>(weight: &FrozenWeight, f: impl FnOnce(&Source<'_>) -> R) -> Result<R> {
    match weight {
        FrozenWeight::Dense(w) | FrozenWeight::Bordered(Bordered { weight: w, .. }) => {
            let (storage, layout) = w.storage_and_layout();
            let source = match w.dtype() {
                DType::F32 => Source::F32(cpu_slice(&storage, layout)?),
                DType::F64 => Source::F64(cpu_slice(&storage, layout)?),
                DType::F16 => Source::F16(cpu_slice(&storage, layout)?),
                DType::BF16 => Source::Bf16(cpu_slice(&storage, layout)?),
                other => bail!("dense weight {:?} is {other:?}, expected f32, f16, bf16 or f64", w.dims()),
            };
            Ok(f(&source))
        }
        FrozenWeight::Nf4(w) => Ok(f(&Source::Nf4(w))),
        FrozenWeight::Int8(w) => Ok(f(&Source::Int8(w))),
        FrozenWeight::Gguf(w) => Ok(f(&Source::Gguf(Blocks::new(w)?))),
    }
}

impl Source<'_> {
    /// `dst` <- columns `start..start + dst.len()` of `row`; `start` and the end are multiples of 256 or the row's ends.
    fn load(&self, d_in: usize, row: usize, start: usize, dst: &mut [f32]) {
        let at = row * d_in + start;
        let range = at..at + dst.len();
        match self {
            Self::F32(w) => dst.copy_from_slice(&w[range]),
            Self::F64(w) => w[range].iter().zip(dst).for_each(|(w, d)| *d = *w as f32),
            Self::F16(w) => f16::load(&w[range], dst),
            Self::Bf16(w) => bf16::load(&w[range], dst),
            Self::Nf4(w) => w.load(at, dst),
            Self::Int8(w) => w.load(row, start, dst),
            Self::Gguf(w) => w.load(row, start, dst),
        }
    }

    /// y [rows, n] <- rows `first..` of the weight times x [n, d_in]^T, with what is beside them (rows of B from `first` on).
    fn dots(&self, d_in: usize, first: usize, x: &[f32], beside: &[Beside<'_>], y: &mut [f32]) {
        let n = x.len() / d_in;
        let rows = y.len() / n;
        let range = first * d_in..(first + rows) * d_in;
        match self {
            Self::F32(w) => dots_beside(&w[range], x, d_in, beside, y),
            Self::Bf16(w) => dots_beside::<u16>(w[range].reinterpret_cast(), x, d_in, beside, y),
            Self::Int8(w) => {
                let (codes, _) = w.parts();
                dots(&codes[range], x, d_in, y);
                for (r, y) in y.chunks_exact_mut(n).enumerate() {
                    crate::vector::scale(w.row(first + r).1, y);
                    for (y, side) in y.iter_mut().zip(beside) {
                        *y += crate::vector::dot(&side.b[r * side.u.len()..][..side.u.len()], side.u);
                    }
                }
            }
            _ => {
                let mut scratch = vec![0f32; rows * d_in];
                for (r, row) in scratch.chunks_exact_mut(d_in).enumerate() {
                    self.load(d_in, first + r, 0, row);
                }
                dots_beside(&scratch, x, d_in, beside, y);
            }
        }
    }
}

/// x [n, d_in] W^T for few rows.
fn few(source: &Source<'_>, x: &[f32], n: usize, d_out: usize, d_in: usize) -> Vec<f32> {
    const ROWS: usize = 32;
    if n == 0 {
        return Vec::new();
    }
    let mut by_output = vec![0f32; d_out * n];
    let beside = vec![Beside::default(); n];
    chunks(&mut by_output, ROWS * n, d_out * d_in / 4, |i, piece| source.dots(d_in, i * ROWS, x, &beside, piece));
    if n == 1 {
        return by_output;
    }
    let mut y = vec![0f32; n * d_out];
    for (j, y) in y.chunks_mut(d_out).enumerate() {
        y.iter_mut().zip(by_output.iter().skip(j).step_by(n)).for_each(|(y, v)| *y = *v);
    }
    y
}

/// Rows `rows` of the matrix in f32.
pub(super) fn dequantize(weight: &FrozenWeight, rows: Range<usize>) -> Result<Tensor> {
    let (d_out, d_in) = weight.dims();
    if rows.start > rows.end || rows.end > d_out {
        bail!("a weight [{d_out}, {d_in}] has no rows {rows:?}")
    }
    let count = rows.len();
    let values = with_source(weight, |source| {
        let mut values = vec![0f32; count * d_in];
        let per = parallel::rows_per_piece(d_in, 1);
        chunks(&mut values, per * d_in, count * d_in, |i, piece| {
            for (r, dst) in piece.chunks_mut(d_in).enumerate() {
                source.load(d_in, rows.start + i * per + r, 0, dst);
            }
        });
        values
    })?;
    Tensor::from_vec(values, (count, d_in), &weight.device())
}
