//! Dot products of weight rows with few input rows: each weight is read once from memory, in the order it lies there, with
//! several sums under way to hide the time of each. A low-rank product beside them is a few more terms of each sum.
//!
//! Equation: y[i, j] = sum over p of w[i, p] x[j, p] + sum over q of b_j[i, q] u_j[q]
//! Shapes:   w [rows, k] in f32, bf16 or int8, x [n, k] f32 with n small, b_j [rows, r_j], u_j `[r_j]`, y [rows, n]
//! Cost:     2 rows n (k + r) FLOPs; a row of w comes from memory once. The order of a sum depends on its lengths only

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

/// What is added beside the weight for one input row: rows of B [rows, r] and u `[r]`. Empty: nothing.
#[derive(Clone, Copy, Default)]
pub(crate) struct Beside<'a> {
    pub(crate) b: &'a [f32],
    pub(crate) u: &'a [f32],
}

/// y [rows, n] <- w [rows, k] x [n, k]^T.
pub(crate) fn dots<T: Stored>(w: &[T], x: &[f32], k: usize, y: &mut [f32]) {
    dots_beside(w, x, k, &vec![Beside::default(); x.len() / k.max(1)], y);
}

/// The same with a low-rank product beside it, another for each input row.
pub(crate) fn dots_beside<T: Stored>(w: &[T], x: &[f32], k: usize, beside: &[Beside<'_>], y: &mut [f32]) {
    let (rows, n) = (w.len() / k, x.len() / k);
    let fits = beside.len() == n && beside.iter().all(|side| side.b.len() == rows * side.u.len());
    assert!(w.len() == rows * k && x.len() == n * k && y.len() == rows * n && fits, "dots: sizes");
    #[cfg(target_arch = "x86_64")]
    if crate::simd::level() >= crate::simd::Level::V4 {
        // SAFETY: the level was checked, the sizes too.
        unsafe { v4::dots(w, x, k, beside, y) };
        return;
    }
    for (i, (w, y)) in w.chunks_exact(k).zip(y.chunks_exact_mut(n)).enumerate() {
        for ((x, side), y) in x.chunks_exact(k).zip(beside).zip(y) {
            let low_rank = crate::vector::dot(&side.b[i * side.u.len()..][..side.u.len()], side.u);
            *y = T::dot(w, x) + low_rank;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod v4 {
    use super::{Beside, Stored};
    use std::arch::x86_64::{
        __m512, __mmask16, _MM_HINT_T0, _mm_maskz_loadu_epi8, _mm_prefetch, _mm_storeu_ps, _mm256_maskz_loadu_epi16,
        _mm512_add_ps, _mm512_castps512_ps128, _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps,
        _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
        _mm512_shuffle_ps, _mm512_slli_epi32, _mm512_unpackhi_ps, _mm512_unpacklo_ps,
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
    /// Bytes by which memory is asked for ahead.
    const AHEAD: usize = 4096;

    /// The sums of the entries of four registers, each in the same order.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn reduce([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let all = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
        let half = _mm512_add_ps(all, _mm512_shuffle_f32x4::<0x4e>(all, all));
        let whole = _mm512_add_ps(half, _mm512_shuffle_f32x4::<0xb1>(half, half));
        let mut out = [0f32; 4];
        // SAFETY: four entries of room.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(whole)) };
        out
    }

    /// Adds the next entries of a weight row times those of C input rows, `counts` of each register.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn step<T: Stored, const C: usize>(
        w: *const T,
        x: *const f32,
        k: usize,
        counts: [usize; STEPS],
        sums: &mut [[__m512; STEPS]; C],
    ) {
        let mut wide = [_mm512_setzero_ps(); STEPS];
        for (s, wide) in wide.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *wide = unsafe { T::load(w.wrapping_add(16 * s), counts[s]) };
        }
        for (c, sums) in sums.iter_mut().enumerate() {
            for (s, (sum, wide)) in sums.iter_mut().zip(wide).enumerate() {
                // SAFETY: the caller's promise.
                let x = unsafe { <f32 as Stored>::load(x.wrapping_add(c * k + 16 * s), counts[s]) };
                *sum = _mm512_fmadd_ps(wide, x, *sum);
            }
        }
    }

    /// Weight row `i` at `w` with C input rows of `k` entries, up to four, and what is beside them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn row<T: Stored, const C: usize>(
        (w, i): (*const T, usize),
        (ahead, pace): (*const T, usize),
        x: *const f32,
        k: usize,
        beside: &[Beside<'_>],
        y: &mut [f32],
    ) {
        let mut sums = [[_mm512_setzero_ps(); STEPS]; C];
        let mut p = 0;
        // Whole steps first: their masks are constants.
        while p + 16 * STEPS <= k {
            // Memory is asked for ahead: the weight is one stream from its first row to its last.
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(p / pace).cast());
            // SAFETY: rows of k entries, C of them at x.
            unsafe { step::<T, C>(w.wrapping_add(p), x.wrapping_add(p), k, [16; STEPS], &mut sums) };
            p += 16 * STEPS;
        }
        if p < k {
            let mut counts = [0; STEPS];
            counts.iter_mut().enumerate().for_each(|(s, count)| *count = (k - p).saturating_sub(16 * s));
            // SAFETY: as above, with what is left of a row.
            unsafe { step::<T, C>(w.wrapping_add(p), x.wrapping_add(p), k, counts, &mut sums) };
        }
        let mut totals = [_mm512_setzero_ps(); 4];
        for ((total, [a, b, c, d]), side) in totals.iter_mut().zip(sums).zip(beside) {
            let mut sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
            let r = side.u.len();
            for q in (0..r).step_by(16) {
                // SAFETY: row i of B and u have r entries.
                let (b, u) = unsafe {
                    let b = side.b.as_ptr().wrapping_add(i * r + q);
                    (<f32 as Stored>::load(b, r - q), <f32 as Stored>::load(side.u.as_ptr().wrapping_add(q), r - q))
                };
                sum = _mm512_fmadd_ps(b, u, sum);
            }
            *total = sum;
        }
        y[..C].copy_from_slice(&reduce(totals)[..C]);
    }

    /// # Safety
    /// w holds rows x k entries, x as many rows as `beside` has entries, each B rows x r.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn dots<T: Stored>(w: &[T], x: &[f32], k: usize, beside: &[Beside<'_>], y: &mut [f32]) {
        let n = beside.len();
        // Each pass over a row asks for its share of a later one, so that memory is never idle.
        let passes = n.div_ceil(4);
        for (i, (w, y)) in w.chunks_exact(k).zip(y.chunks_exact_mut(n)).enumerate() {
            let (mut c, mut pass) = (0, 0);
            while c < n {
                let ahead = w.as_ptr().cast::<i8>().wrapping_add(AHEAD).cast::<T>().wrapping_add(pass * k / passes);
                let (w, x, side, y) = ((w.as_ptr(), i), x[c * k..].as_ptr(), &beside[c..], &mut y[c..]);
                // SAFETY: the caller's promise.
                c += unsafe {
                    match n - c {
                        4.. => (row::<T, 4>(w, (ahead, passes), x, k, side, y), 4).1,
                        2.. => (row::<T, 2>(w, (ahead, passes), x, k, side, y), 2).1,
                        _ => (row::<T, 1>(w, (ahead, passes), x, k, side, y), 1).1,
                    }
                };
                pass += 1;
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
