//! Factors per output column, and their gradients.
//!
//! Equation: y = g * s + bias + residual;  what reaches s is g dy, dg = sum over rows of dy s
//! Shapes:   s and y [n, d_out], g and bias `[d_out]`
//! Source:   DoRA arXiv 2402.09353 eq. 5

use crate::element::{Element, zeros};
use crate::parallel::{chunks, tasks};
use crate::simd::{madd, multiversion};
use crate::vector::axpy;

/// Rows of a piece.
const ROWS: usize = 32;

multiversion! {
    /// y <- s gain + y
    fn scaled_sum[FMA](s: &[f32], gain: &[f32], y: &mut [f32]) {
        for ((s, gain), y) in s.iter().zip(gain).zip(y) {
            *y = madd::<FMA>(*s, *gain, *y);
        }
    }
}

multiversion! {
    /// below <- g gain; d <- d + g s
    fn row_gradients[FMA](g: &[f32], s: &[f32], gain: &[f32], below: &mut [f32], d: &mut [f32]) {
        for ((((g, s), gain), below), d) in g.iter().zip(s).zip(gain).zip(below).zip(d) {
            *below = g * gain;
            *d = madd::<FMA>(*g, *s, *d);
        }
    }
}

/// sums * gain + bias + residual, row by row.
pub(super) fn apply<T: Element>(sums: &[T], gain: &[f32], bias: Option<&[f32]>, residual: Option<&[T]>) -> Vec<T> {
    let width = gain.len();
    let mut out = zeros::<T>(sums.len());
    let size = ROWS * width;
    chunks(&mut out, size, sums.len(), |i, piece| {
        let (mut from, mut to, mut row) = (T::scratch(width), T::scratch(width), vec![0f32; width]);
        for (j, y) in piece.chunks_exact_mut(width).enumerate() {
            let at = i * size + j * width;
            match residual {
                Some(residual) => T::load(&residual[at..at + width], &mut row),
                None => row.fill(0.0),
            }
            if let Some(bias) = bias {
                axpy(1.0, bias, &mut row);
            }
            let s = T::view(&sums[at..at + width], &mut from);
            T::write(y, &mut to, |y| {
                y.copy_from_slice(&row);
                scaled_sum(s, gain, y);
            });
        }
    });
    out
}

/// What reaches the sums for `g` of the result, and the gradient of the gain.
pub(super) fn gradients<T: Element>(g: &[T], sums: &[T], gain: &[f32]) -> (Vec<T>, Vec<f32>) {
    let width = gain.len();
    let size = ROWS * width;
    let mut below = zeros::<T>(g.len());
    let mut partial = vec![0f32; g.len().div_ceil(size.max(1)) * width];
    let work: Vec<_> =
        g.chunks(size).zip(sums.chunks(size)).zip(below.chunks_mut(size)).zip(partial.chunks_mut(width)).collect();
    tasks(work, g.len(), |(((g, s), below), d)| {
        let (mut s1, mut s2, mut s3) = (T::scratch(width), T::scratch(width), T::scratch(width));
        for ((g, s), below) in g.chunks(width).zip(s.chunks(width)).zip(below.chunks_mut(width)) {
            let (g, s) = (T::view(g, &mut s1), T::view(s, &mut s2));
            T::write(below, &mut s3, |below| row_gradients(g, s, gain, below, d));
        }
    });
    let mut total = vec![0f32; width];
    partial.chunks(width).for_each(|d| axpy(1.0, d, &mut total));
    (below, total)
}
