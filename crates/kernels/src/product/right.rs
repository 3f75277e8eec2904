//! Right operands, and how their columns are laid out in panels.
//!
//! Shapes:   a matrix [k, n]; a panel of w columns is [k, w] in f32, or [k / 2 rounded up, w, 2] in bf16 pairs
//! Cost:     every entry is read and written once a panel; transposing goes 16 by 16 through registers where there are AVX-512's

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
    /// The transpose [n, k] as it lies in memory and a factor on it, where it does.
    fn as_rows(&self) -> Option<(&[f32], f32)> {
        None
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
pub(crate) fn transpose(rows: &[&[f32]], k: usize, width: usize, dst: &mut [f32]) {
    assert!(rows.iter().all(|row| row.len() == k) && dst.len() >= k * width, "transpose: {k} entries a row");
    let starts: Vec<*const u32> = rows.iter().map(|row| row.as_ptr().cast()).collect();
    // SAFETY: every row holds k entries of 32 bits, checked above, and so does every row of the panel.
    unsafe { transpose_words(&starts, k, width, dst.as_mut_ptr().cast()) }
}

/// dst [k / 2 rounded up, width, 2] <- the transpose of `rows` of bf16 bits in pairs.
pub(crate) fn transpose_pairs(rows: &[&[u16]], k: usize, width: usize, dst: &mut [u16]) {
    assert!(rows.iter().all(|row| row.len() == k) && dst.len() >= k.div_ceil(2) * 2 * width, "transpose: {k} entries");
    let starts: Vec<*const u32> = rows.iter().map(|row| row.as_ptr().cast()).collect();
    // SAFETY: every row holds k / 2 whole pairs, checked above; they are read without regard to alignment.
    unsafe { transpose_words(&starts, k / 2, width, dst.as_mut_ptr().cast()) }
    if k % 2 == 1 {
        for (j, pair) in dst[(k - 1) * width..].chunks_exact_mut(2).take(width).enumerate() {
            pair[0] = rows.get(j).map_or(0, |row| row[k - 1]);
            pair[1] = 0;
        }
    }
}

/// The same for entries of 32 bits.
///
/// # Safety
/// `rows` point to k entries each, `dst` to [k, width].
unsafe fn transpose_words(rows: &[*const u32], k: usize, width: usize, dst: *mut u32) {
    // A block of the panel stays in the first-level cache while all rows write to it.
    const BLOCK: usize = 64;
    for start in (0..k).step_by(BLOCK) {
        let end = (start + BLOCK).min(k);
        for first in (0..width).step_by(16) {
            let mut p = start;
            #[cfg(target_arch = "x86_64")]
            if first + 16 <= rows.len() && crate::simd::level() >= crate::simd::Level::V4 {
                while p + 16 <= end {
                    // SAFETY: 16 rows of at least p + 16 entries; the level was checked.
                    unsafe { v4::transpose(&rows[first..first + 16], p, dst.add(p * width + first), width) };
                    p += 16;
                }
            }
            for j in first..(first + 16).min(width) {
                for p in p..end {
                    // SAFETY: within the row and the panel.
                    unsafe {
                        let value = rows.get(j).map_or(0, |row| row.add(p).read_unaligned());
                        dst.add(p * width + j).write_unaligned(value);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod v4 {
    use std::arch::x86_64::{
        __m512i, _mm512_loadu_si512, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    /// 16 entries of 16 rows from `p` on, transposed to rows `stride` apart.
    ///
    /// # Safety
    /// The rows hold p + 16 entries; `dst` has 16 rows of 16.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(rows: &[*const u32], p: usize, dst: *mut u32, stride: usize) {
        let mut r = [_mm512_setzero_si512(); 16];
        for (r, row) in r.iter_mut().zip(rows) {
            // SAFETY: the caller's promise.
            *r = unsafe { _mm512_loadu_si512(row.add(p).cast()) };
        }
        // Within each quarter of a register: 4 by 4 blocks of 4 rows.
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
            r[4 * i] = _mm512_unpacklo_epi64(a, c);
            r[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
            r[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
            r[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        // Quarter q of r[4 i + c] is column 4 q + c of rows 4 i..4 i + 4: gather the quarters of equal q.
        for c in 0..4 {
            let [a, b, d, e] = [r[c], r[4 + c], r[8 + c], r[12 + c]];
            let low: [__m512i; 2] = [_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0x44>(d, e)];
            let high: [__m512i; 2] = [_mm512_shuffle_i32x4::<0xee>(a, b), _mm512_shuffle_i32x4::<0xee>(d, e)];
            let columns = [
                _mm512_shuffle_i32x4::<0x88>(low[0], low[1]),
                _mm512_shuffle_i32x4::<0xdd>(low[0], low[1]),
                _mm512_shuffle_i32x4::<0x88>(high[0], high[1]),
                _mm512_shuffle_i32x4::<0xdd>(high[0], high[1]),
            ];
            for (q, column) in columns.into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_si512(dst.add((4 * q + c) * stride).cast(), column) };
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
        let (pairs, even) = (to.as_chunks_mut::<2>().0, &even[at..at + here]);
        match odd {
            Some(odd) => {
                for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(&odd[at..at + here]) {
                    *pair = [*even, *odd];
                }
            }
            None => pairs.iter_mut().zip(even).for_each(|(pair, even)| *pair = [*even, 0]),
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

    fn as_rows(&self) -> Option<(&[f32], f32)> {
        self.transposed.then_some((self.data, self.scale))
    }

    fn pack(&self, first: usize, columns: usize, mut dst: &mut [f32]) {
        for (at, width) in panels_of(columns) {
            let (panel, rest) = std::mem::take(&mut dst).split_at_mut(self.k * width);
            dst = rest;
            let (start, here) = (first + at, micro::width().min(columns - at));
            if self.transposed {
                let rows: Vec<&[f32]> = self.data[start * self.k..].chunks(self.k.max(1)).take(here).collect();
                transpose(&rows, self.k, width, panel);
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
