//! Sums of matrix products with packed right operands: the products with frozen weights and the low-rank ones beside them,
//! in one pass over the output.
//!
//! Equation: out = sum over terms of L_t R_t
//! Shapes:   L_t [m, k_t] row-major, R_t [k_t, n] packed into panels of 32 or 16 columns, out [m, n]
//! Source:   the layout of Goto and van de Geijn, ACM TOMS 34(3), 2008, with the right operand as the packed one
//! Cost:     2 m n sum(k_t) FLOPs; each element of the output is written once
//!
//! An output is one chain of multiply-adds over its terms in order, whatever the tile it falls into: bits depend neither
//! on the number of threads nor on the other rows. The one exception is where a product has few rows ([`FEW`]): it is made of dot
//! products, which add in another order, so a row among few and the same row among many may differ in rounding.

mod dots;
mod micro;
mod outer;
mod right;
mod term;

use crate::element::Element;
use crate::parallel;
use crate::simd::has_bf16;
pub(crate) use dots::{Beside, dots, dots_beside};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
pub(crate) use micro::width as panel_width;
use micro::{Part, Place};
pub(crate) use outer::{outer, outer_transposed};
pub(crate) use right::{Right, Slice, scatter, scatter_pairs, transpose, transpose_pairs};
use std::cell::RefCell;
use term::pairs_mut;
pub(crate) use term::{Rows, Term};

/// Up to this many rows, dot products beat panels (each weight is read once either way).
pub(crate) const FEW: usize = 12;

/// Panels that a task packs, where there are many.
const PANELS_A_TASK: usize = 4;

/// Bytes of left operands that stay in the second-level cache while a task's panels pass over them.
const BLOCK_BYTES: usize = 256 << 10;

/// Element types that a product can read and write.
pub(crate) trait Multiply: Element {
    /// Rows as they are multiplied; `wide` holds them in f32 where they must be widened.
    fn rows<'a>(src: &'a [Self], wide: &'a mut Vec<f32>) -> Rows<'a>;
    /// out <- sum of `terms`, rounded once.
    fn multiply(m: usize, n: usize, terms: &[Term<'_>]) -> Vec<Self>;
}

/// The columns of `out` [m, stride] from `column` on, n of them, <- sum of `terms`.
pub(crate) fn multiply_into(m: usize, n: usize, terms: &[Term<'_>], out: &mut [f32], stride: usize, column: usize) {
    assert!(column + n <= stride && out.len() == m * stride, "product: place for [{m}, {n}]");
    terms.iter().for_each(|term| term.check(m, n));
    if let Some(values) = few(m, n, terms) {
        for (row, values) in out.chunks_exact_mut(stride).zip(values.chunks_exact(n)) {
            row[column..column + n].copy_from_slice(values);
        }
        return;
    }
    let place = Place::F32 { out: out.as_mut_ptr().wrapping_add(column), stride };
    // SAFETY: asserted above; `out` is borrowed mutably.
    unsafe { multiply(m, n, terms, place) }
}

impl Multiply for f32 {
    fn rows<'a>(src: &'a [Self], _: &'a mut Vec<f32>) -> Rows<'a> {
        Rows::F32(src)
    }
    fn multiply(m: usize, n: usize, terms: &[Term<'_>]) -> Vec<Self> {
        terms.iter().for_each(|term| term.check(m, n));
        if let Some(out) = few(m, n, terms) {
            return out;
        }
        let mut out = Vec::with_capacity(m * n);
        // SAFETY: `multiply` writes all m x n entries.
        unsafe {
            multiply(m, n, terms, Place::F32 { out: out.as_mut_ptr(), stride: n });
            out.set_len(m * n);
        }
        out
    }
}

impl Multiply for bf16 {
    fn rows<'a>(src: &'a [Self], wide: &'a mut Vec<f32>) -> Rows<'a> {
        if has_bf16() {
            Rows::Bf16(src)
        } else {
            *wide = Self::widened(src).into_owned();
            Rows::F32(wide)
        }
    }
    fn multiply(m: usize, n: usize, terms: &[Term<'_>]) -> Vec<Self> {
        if !has_bf16() {
            return Self::narrowed(f32::multiply(m, n, terms));
        }
        let mut out: Vec<Self> = Vec::with_capacity(m * n);
        // SAFETY: `multiply` writes all m x n entries; bf16 is its 16 bits.
        unsafe {
            multiply(m, n, terms, Place::Bf16 { out: out.as_mut_ptr().cast(), stride: n });
            out.set_len(m * n);
        }
        out
    }
}

impl Multiply for f16 {
    fn rows<'a>(src: &'a [Self], wide: &'a mut Vec<f32>) -> Rows<'a> {
        *wide = Self::widened(src).into_owned();
        Rows::F32(wide)
    }
    fn multiply(m: usize, n: usize, terms: &[Term<'_>]) -> Vec<Self> {
        Self::narrowed(f32::multiply(m, n, terms))
    }
}

thread_local! {
    /// Panels of the task that this thread is at.
    static PANELS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The sum of `terms` for few rows by dot products, where the right operands lie in rows.
fn few(m: usize, n: usize, terms: &[Term<'_>]) -> Option<Vec<f32>> {
    if m == 0 {
        return Some(Vec::new());
    }
    // Beyond that, the ends of short sums cost more than panels do.
    let short = |t: &Term<'_>| matches!(t, Term::Product { .. }) && t.k() < 64;
    if m > FEW || (m > 4 && terms.iter().any(short)) {
        return None;
    }
    let direct = |t: &Term<'_>| match t {
        Term::Product { right, .. } => right.as_rows().is_some() && right.k() > 0,
        Term::Shift(_) | Term::Add(_) => true,
    };
    if !terms.iter().all(direct) {
        return None;
    }
    let mut out = vec![0f32; m * n];
    let add = |out: &mut [f32], rows: Rows<'_>| match rows {
        Rows::F32(rows) => crate::vector::axpy(1.0, rows, out),
        Rows::Bf16(rows) => crate::vector::axpy(1.0, &bf16::widened(rows), out),
    };
    for term in terms {
        match *term {
            Term::Product { rows, stride, right } => {
                let (w, scale) = right.as_rows()?;
                let (k, wide) = (right.k(), rows.widened());
                let x: Vec<f32> = (0..m).flat_map(|i| &wide[i * stride..][..k]).copied().collect();
                let mut by_output = vec![0f32; n * m];
                dots(w, &x, k, &mut by_output);
                for (j, values) in by_output.chunks_exact(m).enumerate() {
                    values.iter().enumerate().for_each(|(i, v)| out[i * n + j] += scale * v);
                }
            }
            Term::Shift(values) => out.chunks_exact_mut(n).for_each(|row| add(row, Rows::F32(values))),
            Term::Add(rows) => add(&mut out, rows),
        }
    }
    Some(out)
}

/// A place that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Shared(Place);

// SAFETY: `multiply` gives each task its own rows and columns of the place.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(self, row: usize, column: usize) -> Place {
        match self.0.down(row) {
            Place::F32 { out, stride } => Place::F32 { out: out.wrapping_add(column), stride },
            Place::Bf16 { out, stride } => Place::Bf16 { out: out.wrapping_add(column), stride },
        }
    }
}

/// place [m, n] <- sum of the terms.
///
/// # Safety
/// `place` has room for m x n entries that nobody else uses meanwhile.
unsafe fn multiply(m: usize, n: usize, terms: &[Term<'_>], place: Place) {
    terms.iter().for_each(|term| term.check(m, n));
    let sums = terms.iter().position(|t| !matches!(t, Term::Product { .. })).unwrap_or(terms.len());
    assert!(!terms[sums..].iter().any(|t| matches!(t, Term::Product { .. })), "product: products come first");
    if m == 0 || n == 0 {
        return;
    }
    let place = Shared(place);
    let width = micro::width();
    let own = terms.iter().map(|t| if let Term::Product { right, .. } = t { right.strip() } else { 0 });
    // Several panels a task, so that the rows of a block are read once for all of them, if that leaves enough tasks.
    let several =
        if n >= 2 * PANELS_A_TASK * width * rayon::current_num_threads() { PANELS_A_TASK * width } else { width };
    let strip = own.fold(several, usize::max);
    let (strips, work) = (n.div_ceil(strip), m * n * terms.iter().map(Term::k).sum::<usize>() / 16);
    // Rows are cut too where there are too few strips for the threads; each cut packs its panels again.
    let wanted = if parallel::worth(work) { (3 * rayon::current_num_threads()).div_ceil(strips) } else { 1 };
    let height = micro::height();
    let rows = m.div_ceil(wanted.clamp(1, m.div_ceil(8 * height))).next_multiple_of(height);
    let cuts = m.div_ceil(rows);
    parallel::map(strips * cuts, work, |i| {
        let (first, top) = (i / cuts * strip, i % cuts * rows);
        let (columns, rows) = (strip.min(n - first), rows.min(m - top));
        // Nothing in `fill` waits for other tasks: a thread that waited could be given another and ask for its panels again.
        PANELS.with_borrow_mut(|panels| {
            // SAFETY: the task's own rows and columns of the place.
            unsafe { fill(terms, panels, n, (top, rows), (first, columns), place) };
        });
    });
}

/// Starts and widths of the panels that `columns` are cut into.
pub(crate) fn panels_of(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = micro::width();
    (0..columns).step_by(width).map(move |at| {
        let here = width.min(columns - at);
        (at, if here <= 16 { 16 } else { width })
    })
}

/// One task: packs the panels of its columns and runs its rows over them.
///
/// # Safety
/// As [`multiply`], for these rows and columns.
unsafe fn fill(
    terms: &[Term<'_>],
    scratch: &mut Vec<f32>,
    n: usize,
    (top, rows): (usize, usize),
    (first, columns): (usize, usize),
    place: Shared,
) {
    let each: Vec<usize> =
        terms.iter().map(|t| panels_of(columns).map(|(_, width)| t.panel(width)).sum::<usize>()).collect();
    let total: usize = each.iter().sum();
    if scratch.len() < total {
        scratch.resize(total, 0.0);
    }
    let mut rest = &mut scratch[..total];
    let mut packed: Vec<&[f32]> = Vec::with_capacity(terms.len());
    for (term, size) in terms.iter().zip(&each) {
        let (own, after) = std::mem::take(&mut rest).split_at_mut(*size);
        rest = after;
        match term {
            Term::Product { rows: Rows::F32(_), right, .. } => right.pack(first, columns, own),
            Term::Product { rows: Rows::Bf16(_), right, .. } => right.pack_pairs(first, columns, pairs_mut(own)),
            _ => {}
        }
        packed.push(own);
    }
    let height = micro::height();
    let bytes: usize = terms.iter().map(Term::bytes_a_row).sum();
    let block = (BLOCK_BYTES / bytes.max(1) / height * height).max(height);
    let mut parts: Vec<Part> = Vec::with_capacity(terms.len());
    let mut copies: Vec<Vec<f32>> = terms.iter().map(|t| vec![0.0; t.copy_len(block.min(rows))]).collect();
    for start in (top..top + rows).step_by(block) {
        let end = (start + block).min(top + rows);
        let copied = terms.iter().zip(&mut copies).filter(|(t, _)| t.collides());
        copied.for_each(|(term, copy)| term.copy(start, end, copy));
        let mut offsets = vec![0usize; terms.len()];
        for (at, width) in panels_of(columns) {
            let here = micro::width().min(columns - at);
            for tile in (start..end).step_by(height) {
                parts.clear();
                for (((term, panel), offset), copy) in terms.iter().zip(&packed).zip(&offsets).zip(&copies) {
                    parts.push(term.part((tile, start), (first + at, n), &panel[*offset..], copy));
                }
                // SAFETY: operands were checked in `multiply`, panels are as long as their terms say, the place is the
                // task's.
                unsafe { micro::tile(&parts, place.at(tile, first + at), height.min(end - tile), here) };
            }
            terms.iter().zip(&mut offsets).for_each(|(term, offset)| *offset += term.panel(width));
        }
    }
}

/// `values` rounded to bf16 bits.
fn round(values: &[f32], out: &mut [bf16]) {
    crate::vector::to_bf16(values, out.reinterpret_cast_mut());
}
