//! A tile in AVX-512 registers.

use super::{Part, Place};
use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __mmask16, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_add_ps,
    _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_slli_epi32,
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
            *s = unsafe { _mm512_dpbf16_ps(*s, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b)) };
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
        pub(super) unsafe fn $name_bf16<const ROWS: usize>(parts: &[Part], at: usize, place: Place, columns: usize) {
            let mut sums = [[_mm512_setzero_ps(); $vectors]; ROWS];
            for part in parts {
                match part.down(at) {
                    // SAFETY: the caller's promise.
                    Part::F32 { left, stride, k, panel } => sums = unsafe { add_f32(sums, left, stride, k, panel) },
                    // SAFETY: as above.
                    Part::Bf16 { left, stride, k, panel } => sums = unsafe { add_bf16(sums, left, stride, k, panel) },
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
