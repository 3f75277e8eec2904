//! Dot products of weight rows with few input rows: each weight is read once from memory, in the order it lies there, with
//! several sums under way to hide the time of each.
//!
//! Equation: y[i, j] = sum over p of w[i, p] x[j, p]
//! Shapes:   w [rows, k] in f32, bf16 or int8, x [n, k] f32 with n small, y [rows, n]
//! Cost:     2 rows n k FLOPs; a row of w comes from memory once. The order of a sum depends on its length only

use crate::vector::{dot, dot_bf16, dot_i8};

/// A stored form that dot products read as it is.
pub(crate) trait Stored: Copy {
    /// One row with one input row.
    fn dot(w: &[Self], x: &[f32]) -> f32;
    /// 16 entries from `at` on, those beyond `count` as zero.
    ///
    /// # Safety
    /// `count` entries can be read; AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(at: *const Self, count: usize) -> std::arch::x86_64::__m512;
}

/// y [rows, n] <- w [rows, k] x [n, k]^T.
pub(crate) fn dots<T: Stored>(w: &[T], x: &[f32], k: usize, y: &mut [f32]) {
    let (rows, n) = (w.len() / k, x.len() / k);
    assert!(w.len() == rows * k && x.len() == n * k && y.len() == rows * n, "dots: sizes");
    #[cfg(target_arch = "x86_64")]
    if crate::simd::level() >= crate::simd::Level::V4 {
        // SAFETY: the level was checked, the sizes too.
        unsafe { v4::dots(w, x, k, n, y) };
        return;
    }
    for (w, y) in w.chunks_exact(k).zip(y.chunks_exact_mut(n)) {
        x.chunks_exact(k).zip(y).for_each(|(x, y)| *y = T::dot(w, x));
    }
}

#[cfg(target_arch = "x86_64")]
mod v4 {
    use super::Stored;
    use std::arch::x86_64::{
        __m512, __mmask16, _MM_HINT_T0, _mm_maskz_loadu_epi8, _mm_prefetch, _mm256_maskz_loadu_epi16, _mm512_add_ps,
        _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_fmadd_ps,
        _mm512_maskz_loadu_ps, _mm512_reduce_add_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    };

    fn mask(count: usize) -> __mmask16 {
        ((1u32 << count.min(16)) - 1) as u16
    }

    macro_rules! stored {
        ($type:ty, $dot:path, |$at:ident, $mask:ident| $load:expr) => {
            impl Stored for $type {
                fn dot(w: &[Self], x: &[f32]) -> f32 {
                    $dot(w, x)
                }
                #[inline]
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                unsafe fn load($at: *const Self, count: usize) -> __m512 {
                    let $mask = mask(count);
                    // SAFETY: masked to the entries there are.
                    unsafe { $load }
                }
            }
        };
    }
    stored!(f32, super::dot, |at, m| _mm512_maskz_loadu_ps(m, at));
    stored!(u16, super::dot_bf16, |at, m| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
        _mm256_maskz_loadu_epi16(m, at.cast())
    ))));
    stored!(i8, super::dot_i8, |at, m| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, at))));

    /// Registers of a row in flight.
    const STEPS: usize = 4;

    /// One weight row with C input rows of `k` entries.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn row<T: Stored, const C: usize>(w: *const T, x: *const f32, k: usize) -> [f32; C] {
        let mut sums = [[_mm512_setzero_ps(); STEPS]; C];
        let mut p = 0;
        while p < k {
            // Memory is asked for a page's quarter ahead: the weight is one stream from its first row to its last.
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(p).cast::<i8>().wrapping_add(1024));
            let mut wide = [_mm512_setzero_ps(); STEPS];
            for (s, wide) in wide.iter_mut().enumerate() {
                // SAFETY: a row of k entries.
                *wide = unsafe { T::load(w.wrapping_add(p + 16 * s), k.saturating_sub(p + 16 * s)) };
            }
            for (c, sums) in sums.iter_mut().enumerate() {
                for (s, (sum, wide)) in sums.iter_mut().zip(wide).enumerate() {
                    let at = p + 16 * s;
                    // SAFETY: C rows of k entries.
                    let x = unsafe { <f32 as Stored>::load(x.wrapping_add(c * k + at), k.saturating_sub(at)) };
                    *sum = _mm512_fmadd_ps(wide, x, *sum);
                }
            }
            p += 16 * STEPS;
        }
        let mut out = [0f32; C];
        for (out, [a, b, c, d]) in out.iter_mut().zip(sums) {
            *out = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
        }
        out
    }

    /// # Safety
    /// w holds rows x k entries, x n x k.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn dots<T: Stored>(w: &[T], x: &[f32], k: usize, n: usize, y: &mut [f32]) {
        for (w, y) in w.chunks_exact(k).zip(y.chunks_exact_mut(n)) {
            let mut c = 0;
            while c < n {
                let x = x[c * k..].as_ptr();
                macro_rules! put {
                    ($c:literal) => {{
                        // SAFETY: the caller's promise.
                        y[c..][..$c].copy_from_slice(&unsafe { row::<T, $c>(w.as_ptr(), x, k) });
                        $c
                    }};
                }
                c += match n - c {
                    4.. => put!(4),
                    2.. => put!(2),
                    _ => put!(1),
                };
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod portable {
    use super::{Stored, dot, dot_bf16, dot_i8};

    macro_rules! stored {
        ($($type:ty => $dot:path),*) => {
            $(impl Stored for $type {
                fn dot(w: &[Self], x: &[f32]) -> f32 {
                    $dot(w, x)
                }
            })*
        };
    }
    stored!(f32 => dot, u16 => dot_bf16, i8 => dot_i8);
}
