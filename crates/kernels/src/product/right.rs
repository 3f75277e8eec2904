//! Right operands, and how their columns are laid out in panels.

use super::{micro, panels_of, round};
use half::bf16;

/// A matrix [k, n] whose columns can be packed.
///
/// Columns `first..first + columns` are laid out as panels of [`micro::width`] columns, the last one 16 wide if that is
/// enough, each [k, width] with zeros beyond the last column; in pairs: [k / 2 rounded up, width, 2] with a zero after an odd k.
pub(crate) trait Right: Sync {
    /// Rows.
    fn k(&self) -> usize;
    /// Columns.
    fn n(&self) -> usize;
    /// Columns that are best packed at once.
    fn strip(&self) -> usize {
        0
    }
    /// Packs columns as f32.
    fn pack(&self, first: usize, columns: usize, dst: &mut [f32]);
    /// Packs columns as pairs of bf16.
    fn pack_pairs(&self, first: usize, columns: usize, dst: &mut [u16]) {
        let k = self.k();
        let total: usize = panels_of(columns).map(|(_, width)| k * width).sum();
        let mut wide = vec![0f32; total];
        self.pack(first, columns, &mut wide);
        let (mut from, mut to) = (&wide[..], dst);
        for (_, width) in panels_of(columns) {
            let (panel, rest) = from.split_at(k * width);
            let (pairs, after) = std::mem::take(&mut to).split_at_mut(k.div_ceil(2) * width * 2);
            (from, to) = (rest, after);
            let mut rows = [[bf16::ZERO; 32]; 2];
            for (panel, pairs) in panel.chunks(2 * width).zip(pairs.chunks_exact_mut(2 * width)) {
                rows[1] = [bf16::ZERO; 32];
                for (row, panel) in rows.iter_mut().zip(panel.chunks(width)) {
                    round(panel, &mut row[..width]);
                }
                interleave(rows[0].map(bf16::to_bits), rows[1].map(bf16::to_bits), pairs);
            }
        }
    }
}

fn interleave(even: [u16; 32], odd: [u16; 32], pairs: &mut [u16]) {
    for ((pair, even), odd) in pairs.chunks_exact_mut(2).zip(even).zip(odd) {
        pair[0] = even;
        pair[1] = odd;
    }
}

/// dst [k, width] <- the transpose of `rows` (up to `width` of them, of k entries each), zeros for rows that are not there.
pub(crate) fn transpose<T: Copy>(rows: &[&[T]], k: usize, width: usize, zero: T, dst: &mut [T]) {
    // A block of the panel stays in the first-level cache while all rows write to it.
    const BLOCK: usize = 64;
    for start in (0..k).step_by(BLOCK) {
        let end = (start + BLOCK).min(k);
        let block = &mut dst[start * width..end * width];
        for j in 0..width {
            let column = block.iter_mut().skip(j).step_by(width);
            match rows.get(j) {
                Some(row) => column.zip(&row[start..end]).for_each(|(d, v)| *d = *v),
                None => column.for_each(|d| *d = zero),
            }
        }
    }
}

/// dst [k / 2 rounded up, width, 2] <- the transpose of `rows` of bf16 bits in pairs.
pub(crate) fn transpose_pairs(rows: &[&[u16]], k: usize, width: usize, dst: &mut [u16]) {
    const BLOCK: usize = 64;
    let pairs = k.div_ceil(2);
    for start in (0..pairs).step_by(BLOCK) {
        let end = (start + BLOCK).min(pairs);
        let block = &mut dst[start * 2 * width..end * 2 * width];
        for j in 0..width {
            let column = block.chunks_exact_mut(2).skip(j).step_by(width);
            match rows.get(j) {
                Some(row) => {
                    for (pair, values) in column.zip(row[2 * start..(2 * end).min(k)].chunks(2)) {
                        pair[0] = values[0];
                        pair[1] = values.get(1).copied().unwrap_or(0);
                    }
                }
                None => column.for_each(|pair| pair.fill(0)),
            }
        }
    }
}

/// A row of the matrix [k, n] into panels: row `p` of each gets its columns of `row`, which holds `columns` entries.
pub(crate) fn scatter(row: &[f32], k: usize, p: usize, dst: &mut [f32]) {
    let mut offset = 0;
    for (at, width) in panels_of(row.len()) {
        let here = micro::width().min(row.len() - at);
        let to = &mut dst[offset + p * width..][..width];
        to[..here].copy_from_slice(&row[at..at + here]);
        to[here..].fill(0.0);
        offset += k * width;
    }
}

/// Two rows of bf16 bits (`p` even and the next one; nothing is zero) into panels of pairs.
pub(crate) fn scatter_pairs(even: &[u16], odd: Option<&[u16]>, k: usize, p: usize, dst: &mut [u16]) {
    let mut offset = 0;
    for (at, width) in panels_of(even.len()) {
        let here = micro::width().min(even.len() - at);
        let to = &mut dst[offset + p * width..][..2 * width];
        for (j, pair) in to.chunks_exact_mut(2).take(here).enumerate() {
            pair[0] = even[at + j];
            pair[1] = odd.map_or(0, |odd| odd[at + j]);
        }
        to[2 * here..].fill(0);
        offset += k.div_ceil(2) * 2 * width;
    }
}

/// A matrix in an f32 slice.
#[derive(Clone, Copy)]
pub(crate) struct Slice<'a> {
    data: &'a [f32],
    k: usize,
    n: usize,
    transposed: bool,
    scale: f32,
}

impl<'a> Slice<'a> {
    /// `data` [k, n], times `scale`.
    pub(crate) fn new(data: &'a [f32], k: usize, n: usize, scale: f32) -> Self {
        assert_eq!(data.len(), k * n, "product: right operand [{k}, {n}]");
        Self { data, k, n, transposed: false, scale }
    }

    /// The transpose of `data` [n, k], times `scale`.
    pub(crate) fn transposed(data: &'a [f32], k: usize, n: usize, scale: f32) -> Self {
        Self { transposed: true, ..Self::new(data, k, n, scale) }
    }
}

impl Right for Slice<'_> {
    fn k(&self) -> usize {
        self.k
    }

    fn n(&self) -> usize {
        self.n
    }

    fn pack(&self, first: usize, columns: usize, mut dst: &mut [f32]) {
        for (at, width) in panels_of(columns) {
            let (panel, rest) = std::mem::take(&mut dst).split_at_mut(self.k * width);
            dst = rest;
            let (start, here) = (first + at, micro::width().min(columns - at));
            if self.transposed {
                let rows: Vec<&[f32]> = self.data[start * self.k..].chunks(self.k.max(1)).take(here).collect();
                transpose(&rows, self.k, width, 0.0, panel);
            } else {
                for (row, panel) in self.data.chunks(self.n).zip(panel.chunks_exact_mut(width)) {
                    panel[..here].copy_from_slice(&row[start..start + here]);
                    panel[here..].fill(0.0);
                }
            }
            if self.scale != 1.0 {
                crate::vector::scale(self.scale, panel);
            }
        }
    }
}
