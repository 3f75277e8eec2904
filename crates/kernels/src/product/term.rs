//! The terms of a sum of products, and the copy of left rows that would collide in the cache.
//!
//! Shapes:   rows [m, k] with `stride` entries from row to row, right operands [k, n], values `[n]`, rows to add [m, n]

use super::Right;
use super::micro::Part;
use crate::element::Element;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use std::borrow::Cow;

/// Entries of f32 in a line of the cache: rows this much further apart fall into other sets.
const LINE: usize = 16;

/// Rows of a left operand.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16, multiplied in pairs and added in f32.
    Bf16(&'a [bf16]),
}

impl<'a> Rows<'a> {
    /// The rows in f32.
    pub(crate) fn widened(self) -> Cow<'a, [f32]> {
        match self {
            Self::F32(rows) => Cow::Borrowed(rows),
            Self::Bf16(rows) => bf16::widened(rows),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::Bf16(rows) => rows.len(),
        }
    }
}

/// What is done to the sum, in order; products come first.
#[derive(Clone, Copy)]
pub(crate) enum Term<'a> {
    /// Adds rows [m, k], `stride` entries apart, times a right operand [k, n].
    Product {
        /// The left operand.
        rows: Rows<'a>,
        /// Entries from row to row.
        stride: usize,
        /// The right operand.
        right: &'a dyn Right,
    },
    /// Adds to each column its value.
    Shift(&'a [f32]),
    /// Adds rows [m, n].
    Add(Rows<'a>),
}

impl<'a> Term<'a> {
    /// Contiguous `rows` [m, k] times `right` [k, n].
    pub(crate) fn new(rows: Rows<'a>, right: &'a dyn Right) -> Self {
        Self::Product { rows, stride: right.k(), right }
    }

    /// The same with rows `stride` entries apart.
    pub(crate) fn strided(rows: &'a [f32], stride: usize, right: &'a dyn Right) -> Self {
        Self::Product { rows: Rows::F32(rows), stride, right }
    }

    pub(super) fn k(&self) -> usize {
        match self {
            Self::Product { right, .. } => right.k(),
            _ => 0,
        }
    }

    /// Bytes of a row of the left operand.
    pub(super) fn bytes_a_row(&self) -> usize {
        match self {
            Self::Product { rows: Rows::F32(_), right, .. } => 4 * right.k(),
            Self::Product { rows: Rows::Bf16(_), right, .. } => 2 * right.k(),
            _ => 0,
        }
    }

    /// Entries of a panel of `width` columns, as f32.
    pub(super) fn panel(&self, width: usize) -> usize {
        match self {
            Self::Product { rows: Rows::F32(_), right, .. } => right.k() * width,
            Self::Product { rows: Rows::Bf16(_), right, .. } => right.k().div_ceil(2) * width,
            _ => 0,
        }
    }

    pub(super) fn check(&self, m: usize, n: usize) {
        match self {
            Self::Product { rows, stride, right } => {
                assert_eq!(right.n(), n, "product: right operands of different widths");
                let needed = if m == 0 { 0 } else { (m - 1) * stride + right.k() };
                assert!(rows.len() >= needed, "product: left operand of {m} rows of {}", right.k());
            }
            Self::Shift(values) => assert_eq!(values.len(), n, "product: values for {n} columns"),
            Self::Add(rows) => assert_eq!(rows.len(), m * n, "product: rows to add [{m}, {n}]"),
        }
    }

    /// Whether rows that follow one another fall into the same few sets of the first-level cache, more than it has ways.
    pub(super) fn collides(&self) -> bool {
        match self {
            Self::Product { rows: Rows::F32(_), stride, .. } => (4 * stride).is_multiple_of(4096),
            Self::Product { rows: Rows::Bf16(_), stride, .. } => (2 * stride).is_multiple_of(4096),
            _ => false,
        }
    }

    /// Entries, as f32, of a copy of `rows` rows that do not collide.
    pub(super) fn copy_len(&self, rows: usize) -> usize {
        if self.collides() { rows * (self.bytes_a_row() / 4 + LINE) } else { 0 }
    }

    /// Copies rows `start..end` for [`Self::part`].
    pub(super) fn copy(&self, start: usize, end: usize, to: &mut [f32]) {
        let Self::Product { rows, stride, right } = *self else { return };
        let (k, apart) = (right.k(), self.bytes_a_row() / 4 + LINE);
        for (i, to) in (start..end).zip(to.chunks_exact_mut(apart)) {
            match rows {
                Rows::F32(rows) => to[..k].copy_from_slice(&rows[i * stride..][..k]),
                Rows::Bf16(rows) => pairs_mut(to)[..k].copy_from_slice(rows[i * stride..][..k].reinterpret_cast()),
            }
        }
    }

    /// The part for a tile that starts at row `tile` and column `column` of n; `copy` holds the rows from `start` on, if they
    /// were copied.
    pub(super) fn part(
        &self,
        (tile, start): (usize, usize),
        (column, n): (usize, usize),
        panel: &[f32],
        copy: &[f32],
    ) -> Part {
        let apart = self.bytes_a_row() / 4 + LINE;
        match *self {
            Self::Product { rows: Rows::F32(left), stride, right } => {
                let (left, stride) = if copy.is_empty() {
                    (left[tile * stride..].as_ptr(), stride)
                } else {
                    (copy[(tile - start) * apart..].as_ptr(), apart)
                };
                Part::F32 { left, stride, k: right.k(), panel: panel.as_ptr() }
            }
            Self::Product { rows: Rows::Bf16(left), stride, right } => {
                let (left, stride) = if copy.is_empty() {
                    (left[tile * stride..].as_ptr().cast(), stride)
                } else {
                    (copy[(tile - start) * apart..].as_ptr().cast(), 2 * apart)
                };
                Part::Bf16 { left, stride, k: right.k(), panel: panel.as_ptr().cast() }
            }
            Self::Shift(values) => Part::Shift(values[column..].as_ptr()),
            Self::Add(Rows::F32(rows)) => Part::AddF32 { rows: rows[tile * n + column..].as_ptr(), stride: n },
            Self::Add(Rows::Bf16(rows)) => Part::AddBf16 { rows: rows[tile * n + column..].as_ptr().cast(), stride: n },
        }
    }
}

/// The same memory as bf16 bits.
pub(super) fn pairs_mut(panel: &mut [f32]) -> &mut [u16] {
    // SAFETY: any bits are valid u16; f32 is aligned for it; twice as many entries of half the size.
    unsafe { std::slice::from_raw_parts_mut(panel.as_mut_ptr().cast(), panel.len() * 2) }
}
