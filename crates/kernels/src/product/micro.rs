//! The innermost loops: a tile of the output kept in registers over the whole of all terms.
//!
//! AVX-512: 14 rows by 32 columns (28 accumulators), one broadcast of the left operand for two multiply-adds; bf16 pairs
//! through `vdpbf16ps`. Elsewhere: 6 rows by 16 columns of plain arrays, which compilers turn into vector registers.

use crate::simd::{Level, level};

/// Columns of a panel.
pub(crate) fn width() -> usize {
    match level() {
        Level::V4 | Level::V4Bf16 => 32,
        _ => 16,
    }
}

/// Rows of a tile.
pub(crate) fn height() -> usize {
    match level() {
        Level::V4 | Level::V4Bf16 => 14,
        _ => 6,
    }
}

/// One term as a tile sees it: rows of the left operand `stride` entries apart, and a packed panel.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// f32 by f32: `k` entries a row, panel [k, width].
    F32 { left: *const f32, stride: usize, k: usize, panel: *const f32 },
    /// bf16 by bf16 in pairs along `k`: panel [k / 2 rounded up, width, 2].
    Bf16 { left: *const u16, stride: usize, k: usize, panel: *const u16 },
    /// Adds a value a column.
    Shift(*const f32),
    /// Adds f32 rows.
    AddF32 { rows: *const f32, stride: usize },
    /// Adds bf16 rows.
    AddBf16 { rows: *const u16, stride: usize },
}

/// Where a tile goes: rows `stride` entries apart, `columns` of them.
#[derive(Clone, Copy)]
pub(super) enum Place {
    F32 { out: *mut f32, stride: usize },
    Bf16 { out: *mut u16, stride: usize },
}

impl Part {
    /// The same term for a tile `rows` further down.
    pub(super) fn down(self, rows: usize) -> Self {
        match self {
            Self::F32 { left, stride, k, panel } => {
                Self::F32 { left: left.wrapping_add(rows * stride), stride, k, panel }
            }
            Self::Bf16 { left, stride, k, panel } => {
                Self::Bf16 { left: left.wrapping_add(rows * stride), stride, k, panel }
            }
            Self::AddF32 { rows: from, stride } => Self::AddF32 { rows: from.wrapping_add(rows * stride), stride },
            Self::AddBf16 { rows: from, stride } => Self::AddBf16 { rows: from.wrapping_add(rows * stride), stride },
            same @ Self::Shift(_) => same,
        }
    }
}

impl Place {
    /// The place of a tile `rows` further down.
    pub(super) fn down(self, rows: usize) -> Self {
        match self {
            Self::F32 { out, stride } => Self::F32 { out: out.wrapping_add(rows * stride), stride },
            Self::Bf16 { out, stride } => Self::Bf16 { out: out.wrapping_add(rows * stride), stride },
        }
    }
}

/// Sums the terms of `rows` (at most [`height`]) by `columns` (at most [`width`]) outputs and writes them to `place`.
///
/// # Safety
/// The left operands hold `rows` rows of `k` entries, the panels are as described, and `place` has room for the outputs.
/// bf16 terms only where [`level`] is [`Level::V4Bf16`].
pub(super) unsafe fn tile(parts: &[Part], place: Place, mut rows: usize, columns: usize) {
    let mut at = 0;
    macro_rules! run {
        ($module:ident, $kernel:ident, $($size:literal),*) => {
            while rows > 0 {
                $(if rows >= $size {
                    // SAFETY: the caller's promise, for the rows at..at + size; the level was checked.
                    unsafe { $module::$kernel::<$size>(parts, at, place.down(at), columns) };
                    at += $size;
                    rows -= $size;
                    continue;
                })*
            }
        };
    }
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::V4Bf16 if columns <= 16 => run!(v4, tile_bf16_narrow, 14, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        Level::V4Bf16 => run!(v4, tile_bf16, 14, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        Level::V4 if columns <= 16 => run!(v4, tile_narrow, 14, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        Level::V4 => run!(v4, tile, 14, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        Level::V3 => run!(plain, tile_v3, 6, 4, 2, 1),
        Level::Baseline => run!(plain, tile, 6, 4, 2, 1),
    }
}

/// Plain arrays.
mod plain {
    use super::{Part, Place};
    use crate::simd::madd;

    const WIDTH: usize = 16;

    #[inline(always)]
    unsafe fn generic<const FMA: bool, const ROWS: usize>(parts: &[Part], at: usize, place: Place, columns: usize) {
        let mut sums = [[0f32; WIDTH]; ROWS];
        for part in parts {
            match part.down(at) {
                Part::F32 { left, stride, k, panel } => {
                    for p in 0..k {
                        // SAFETY: the caller's promise on panels and left operands.
                        let b = unsafe { &*panel.add(p * WIDTH).cast::<[f32; WIDTH]>() };
                        for (i, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: as above.
                            let a = unsafe { *left.add(i * stride + p) };
                            for (s, b) in sums.iter_mut().zip(b) {
                                *s = madd::<FMA>(a, *b, *s);
                            }
                        }
                    }
                }
                Part::Shift(values) => {
                    // SAFETY: one value a column.
                    let values = unsafe { std::slice::from_raw_parts(values, columns) };
                    sums.iter_mut().for_each(|sums| sums.iter_mut().zip(values).for_each(|(s, v)| *s += v));
                }
                Part::AddF32 { rows, stride } => {
                    for (i, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: the rows are as long as the output's.
                        let row = unsafe { std::slice::from_raw_parts(rows.add(i * stride), columns) };
                        sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
                    }
                }
                Part::Bf16 { .. } | Part::AddBf16 { .. } => unreachable!("bf16 products need AVX512-BF16"),
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: the caller's promise on the place.
            match place {
                Place::F32 { out, stride } => unsafe {
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), out.add(i * stride), columns);
                },
                Place::Bf16 { out, stride } => {
                    let out = unsafe { std::slice::from_raw_parts_mut(out.add(i * stride), columns) };
                    crate::vector::to_bf16(&sums[..columns], out);
                }
            }
        }
    }

    pub(super) unsafe fn tile<const ROWS: usize>(parts: &[Part], at: usize, place: Place, columns: usize) {
        // SAFETY: the caller's promise.
        unsafe { generic::<{ cfg!(target_arch = "aarch64") }, ROWS>(parts, at, place, columns) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile_v3<const ROWS: usize>(parts: &[Part], at: usize, place: Place, columns: usize) {
        // SAFETY: the caller's promise.
        unsafe { generic::<true, ROWS>(parts, at, place, columns) }
    }
}

/// AVX-512 registers.
#[cfg(target_arch = "x86_64")]
mod v4 {
    use super::{Part, Place};
    use std::arch::x86_64::{
        __m256i, __m512, __m512bh, __mmask16, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_add_ps,
        _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_slli_epi32,
    };
    use std::mem::transmute;

    type Sums<const ROWS: usize, const VECTORS: usize> = [[__m512; VECTORS]; ROWS];

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_f32<const ROWS: usize, const VECTORS: usize>(
        mut sums: Sums<ROWS, VECTORS>,
        left: *const f32,
        stride: usize,
        k: usize,
        panel: *const f32,
    ) -> Sums<ROWS, VECTORS> {
        for p in 0..k {
            let mut b = [_mm512_setzero_ps(); VECTORS];
            for (v, b) in b.iter_mut().enumerate() {
                // SAFETY: the panel holds k rows of VECTORS registers.
                *b = unsafe { _mm512_loadu_ps(panel.add((p * VECTORS + v) * 16)) };
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the left operand holds ROWS rows of k entries.
                let a = _mm512_set1_ps(unsafe { *left.add(i * stride + p) });
                for (s, b) in sums.iter_mut().zip(b) {
                    *s = _mm512_fmadd_ps(a, b, *s);
                }
            }
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn add_bf16<const ROWS: usize, const VECTORS: usize>(
        mut sums: Sums<ROWS, VECTORS>,
        left: *const u16,
        stride: usize,
        k: usize,
        panel: *const u16,
    ) -> Sums<ROWS, VECTORS> {
        for p in 0..k / 2 {
            // SAFETY: the left operand holds ROWS rows of k entries.
            let pair = |i: usize| unsafe { left.add(i * stride + 2 * p).cast::<i32>().read_unaligned() };
            // SAFETY: the panel holds k / 2 (rounded up) rows.
            sums = unsafe { add_pairs(sums, pair, panel.add(p * VECTORS * 32)) };
        }
        if k % 2 == 1 {
            // SAFETY: as above; the pair ends in zero.
            let pair = |i: usize| unsafe { i32::from(*left.add(i * stride + k - 1)) };
            // SAFETY: as above.
            sums = unsafe { add_pairs(sums, pair, panel.add(k / 2 * VECTORS * 32)) };
        }
        sums
    }

    /// One step of two entries along k.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn add_pairs<const ROWS: usize, const VECTORS: usize>(
        mut sums: Sums<ROWS, VECTORS>,
        pair: impl Fn(usize) -> i32,
        panel: *const u16,
    ) -> Sums<ROWS, VECTORS> {
        let mut b = [_mm512_setzero_ps(); VECTORS];
        for (v, b) in b.iter_mut().enumerate() {
            // SAFETY: a row of the panel holds VECTORS registers.
            *b = unsafe { _mm512_loadu_ps(panel.add(v * 32).cast()) };
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let a = _mm512_castsi512_ps(_mm512_set1_epi32(pair(i)));
            for (s, b) in sums.iter_mut().zip(b) {
                // SAFETY: the same 512 bits under another name.
                *s =
                    unsafe { _mm512_dpbf16_ps(*s, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b)) };
            }
        }
        sums
    }

    /// The parts that are no products.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn adjust<const ROWS: usize, const VECTORS: usize>(
        mut sums: Sums<ROWS, VECTORS>,
        part: Part,
        columns: usize,
    ) -> Sums<ROWS, VECTORS> {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (v, s) in sums.iter_mut().enumerate() {
                let (m, at) = (mask(columns, v), 16 * v);
                // SAFETY: masked to the columns there are.
                *s = unsafe {
                    match part {
                        Part::Shift(values) => _mm512_add_ps(*s, _mm512_maskz_loadu_ps(m, values.add(at))),
                        Part::AddF32 { rows, stride } => {
                            _mm512_add_ps(*s, _mm512_maskz_loadu_ps(m, rows.add(i * stride + at)))
                        }
                        Part::AddBf16 { rows, stride } => {
                            let half = _mm256_maskz_loadu_epi16(m, rows.add(i * stride + at).cast());
                            let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half));
                            _mm512_add_ps(*s, _mm512_castsi512_ps(wide))
                        }
                        Part::F32 { .. } | Part::Bf16 { .. } => unreachable!("products are added elsewhere"),
                    }
                };
            }
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_f32<const ROWS: usize, const VECTORS: usize>(
        sums: &Sums<ROWS, VECTORS>,
        out: *mut f32,
        stride: usize,
        columns: usize,
    ) {
        for (i, sums) in sums.iter().enumerate() {
            for (v, s) in sums.iter().enumerate() {
                // SAFETY: masked to the columns there are.
                unsafe { _mm512_mask_storeu_ps(out.add(i * stride + 16 * v), mask(columns, v), *s) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn store_bf16<const ROWS: usize, const VECTORS: usize>(
        sums: &Sums<ROWS, VECTORS>,
        out: *mut u16,
        stride: usize,
        columns: usize,
    ) {
        for (i, sums) in sums.iter().enumerate() {
            for (v, s) in sums.iter().enumerate() {
                // SAFETY: masked to the columns there are; the 256 bits keep their meaning.
                unsafe {
                    let half: __m256i = transmute(_mm512_cvtneps_pbh(*s));
                    _mm256_mask_storeu_epi16(out.add(i * stride + 16 * v).cast(), mask(columns, v), half);
                }
            }
        }
    }

    fn mask(columns: usize, vector: usize) -> __mmask16 {
        let left = columns.saturating_sub(16 * vector).min(16);
        ((1u32 << left) - 1) as u16
    }

    macro_rules! kernels {
        ($name:ident, $name_bf16:ident, $vectors:literal) => {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            pub(super) unsafe fn $name<const ROWS: usize>(parts: &[Part], at: usize, place: Place, columns: usize) {
                let mut sums = [[_mm512_setzero_ps(); $vectors]; ROWS];
                for part in parts {
                    match part.down(at) {
                        // SAFETY: the caller's promise.
                        Part::F32 { left, stride, k, panel } => sums = unsafe { add_f32(sums, left, stride, k, panel) },
                        Part::Bf16 { .. } | Part::AddBf16 { .. } => unreachable!("bf16 products need AVX512-BF16"),
                        // SAFETY: as above.
                        other => sums = unsafe { adjust(sums, other, columns) },
                    }
                }
                match place {
                    // SAFETY: the caller's promise.
                    Place::F32 { out, stride } => unsafe { store_f32(&sums, out, stride, columns) },
                    Place::Bf16 { .. } => unreachable!("bf16 results need AVX512-BF16"),
                }
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
            pub(super) unsafe fn $name_bf16<const ROWS: usize>(
                parts: &[Part],
                at: usize,
                place: Place,
                columns: usize,
            ) {
                let mut sums = [[_mm512_setzero_ps(); $vectors]; ROWS];
                for part in parts {
                    match part.down(at) {
                        // SAFETY: the caller's promise.
                        Part::F32 { left, stride, k, panel } => sums = unsafe { add_f32(sums, left, stride, k, panel) },
                        // SAFETY: as above.
                        Part::Bf16 { left, stride, k, panel } => {
                            sums = unsafe { add_bf16(sums, left, stride, k, panel) }
                        }
                        // SAFETY: as above.
                        other => sums = unsafe { adjust(sums, other, columns) },
                    }
                }
                match place {
                    // SAFETY: the caller's promise.
                    Place::F32 { out, stride } => unsafe { store_f32(&sums, out, stride, columns) },
                    // SAFETY: as above.
                    Place::Bf16 { out, stride } => unsafe { store_bf16(&sums, out, stride, columns) },
                }
            }
        };
    }
    kernels!(tile, tile_bf16, 2);
    kernels!(tile_narrow, tile_bf16_narrow, 1);
}
