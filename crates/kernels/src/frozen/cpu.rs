//! Products with a frozen matrix on the CPU.
//!
//! Few rows (decoding): one dot product per output row, straight from the stored form. f32: one matrix product. Other
//! storage, forward: blocks of weight rows are widened to f32 and multiplied, in parallel. Transposed: blocks of columns
//! in parallel, weight rows summed in order. Block sizes depend on shapes only.

use super::FrozenWeight;
use super::gguf::Blocks;
use super::int8::Int8;
use super::nf4::Nf4;
use crate::element::{Element, by_dtype, cpu_slice, slice};
use crate::matmul::{Matrix, Target, product};
use crate::parallel::{self, chunks};
use crate::vector::{dot, dot_bf16, dot_i8};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::sync::Arc;

/// Up to this many input rows, dot products beat the matrix product (each weight is read once either way).
const FEW: usize = 4;

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
            let x = T::widened(slice::<T>(x, layout)?);
            let y = multiply(&self.weight, &x, n, self.transposed)?;
            <T as WithDType>::to_cpu_storage_owned(T::narrowed(y))
        });
        Ok((out, Shape::from((n, if self.transposed { d_in } else { d_out }))))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let op = FrozenProduct { weight: self.weight.clone(), transposed: !self.transposed };
        Ok(Some(g.contiguous()?.apply_op1(op)?))
    }
}

/// x W^T for rows x [n, d_in], or x W for rows x [n, d_out] if `is_transposed`, in f32.
pub(crate) fn multiply(weight: &FrozenWeight, x: &[f32], n: usize, is_transposed: bool) -> Result<Vec<f32>> {
    let (d_out, d_in) = weight.dims();
    with_source(weight, |source| {
        if is_transposed { transposed(source, x, n, d_out, d_in) } else { forward(source, x, n, d_out, d_in) }
    })
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
        FrozenWeight::Dense(w) => {
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

    /// y`[j]` <- row . x`[j]` for rows x [n, d_in]; `scratch` holds d_in entries.
    fn dots(&self, d_in: usize, row: usize, x: &[f32], scratch: &mut [f32], y: &mut [f32]) {
        let range = row * d_in..(row + 1) * d_in;
        let each = x.chunks(d_in).zip(y);
        match self {
            Self::F32(w) => each.for_each(|(x, y)| *y = dot(&w[range.clone()], x)),
            Self::Bf16(w) => each.for_each(|(x, y)| *y = dot_bf16(w[range.clone()].reinterpret_cast(), x)),
            Self::Int8(w) => {
                let (codes, scale) = w.row(row);
                each.for_each(|(x, y)| *y = scale * dot_i8(codes, x));
            }
            _ => {
                self.load(d_in, row, 0, scratch);
                each.for_each(|(x, y)| *y = dot(scratch, x));
            }
        }
    }
}

/// x [n, d_in] W^T.
fn forward(source: &Source<'_>, x: &[f32], n: usize, d_out: usize, d_in: usize) -> Vec<f32> {
    if n <= FEW {
        return few(source, x, n, d_out, d_in);
    }
    let mut y = vec![0f32; n * d_out];
    let target = Target::new(&mut y, d_out);
    let xm = Matrix::rows(x, d_in);
    if let Source::F32(w) = source {
        // SAFETY: `y` is ours alone.
        unsafe { product((n, d_out, d_in), target, false, xm, Matrix::rows(w, d_in).t(), 1.0, true) };
        return y;
    }
    // Blocks of about half a megabyte, a multiple of 16 rows.
    let block = ((1 << 17) / d_in / 16 * 16).clamp(16, 256);
    parallel::map(d_out.div_ceil(block), n * d_out * d_in / 16, |i| {
        let first = i * block;
        let rows = block.min(d_out - first);
        let mut w = vec![0f32; rows * d_in];
        for (r, dst) in w.chunks_mut(d_in).enumerate() {
            source.load(d_in, first + r, 0, dst);
        }
        let wm = Matrix::rows(&w, d_in).t();
        // SAFETY: each task writes its own columns first..first + rows of `y`, which outlives the tasks.
        unsafe { product((n, rows, d_in), target.skip(first), false, xm, wm, 1.0, false) };
    });
    y
}

/// x [n, d_in] W^T for few rows.
fn few(source: &Source<'_>, x: &[f32], n: usize, d_out: usize, d_in: usize) -> Vec<f32> {
    const ROWS: usize = 32;
    if n == 0 {
        return Vec::new();
    }
    let mut by_output = vec![0f32; d_out * n];
    chunks(&mut by_output, ROWS * n, d_out * d_in / 4, |i, piece| {
        let mut scratch = vec![0f32; d_in];
        for (r, y) in piece.chunks_mut(n).enumerate() {
            source.dots(d_in, i * ROWS + r, x, &mut scratch, y);
        }
    });
    if n == 1 {
        return by_output;
    }
    let mut y = vec![0f32; n * d_out];
    for (j, y) in y.chunks_mut(d_out).enumerate() {
        y.iter_mut().zip(by_output.iter().skip(j).step_by(n)).for_each(|(y, v)| *y = *v);
    }
    y
}

/// g [n, d_out] W.
fn transposed(source: &Source<'_>, g: &[f32], n: usize, d_out: usize, d_in: usize) -> Vec<f32> {
    const ROWS: usize = 256;
    let mut dx = vec![0f32; n * d_in];
    if n == 0 {
        return dx;
    }
    let target = Target::new(&mut dx, d_in);
    let gm = Matrix::rows(g, d_out);
    if let Source::F32(w) = source {
        // SAFETY: `dx` is ours alone.
        unsafe { product((n, d_in, d_out), target, false, gm, Matrix::rows(w, d_in), 1.0, true) };
        return dx;
    }
    // A multiple of 256 columns, so that no GGUF block is cut.
    let block = if d_in <= 2048 { 256 } else { 512 };
    parallel::map(d_in.div_ceil(block), n * d_out * d_in / 16, |i| {
        let first = i * block;
        let columns = block.min(d_in - first);
        let mut w = vec![0f32; ROWS * columns];
        for top in (0..d_out).step_by(ROWS) {
            let rows = ROWS.min(d_out - top);
            for (r, dst) in w.chunks_mut(columns).take(rows).enumerate() {
                source.load(d_in, top + r, first, dst);
            }
            let part = Matrix::rows(&g[top..], d_out);
            let wm = Matrix::rows(&w, columns);
            // SAFETY: each task writes its own columns first..first + columns of `dx`, which outlives the tasks.
            unsafe { product((n, columns, rows), target.skip(first), top > 0, part, wm, 1.0, false) };
        }
    });
    dx
}

/// The matrix in f32.
pub(super) fn dequantize(weight: &FrozenWeight) -> Result<Tensor> {
    let (d_out, d_in) = weight.dims();
    let values = with_source(weight, |source| {
        let mut values = vec![0f32; d_out * d_in];
        let per = parallel::rows_per_piece(d_in, 1);
        chunks(&mut values, per * d_in, d_out * d_in, |i, piece| {
            for (r, dst) in piece.chunks_mut(d_in).enumerate() {
                source.load(d_in, i * per + r, 0, dst);
            }
        });
        values
    })?;
    Tensor::from_vec(values, (d_out, d_in), &weight.device())
}
