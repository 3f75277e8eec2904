//! A tile in AVX2 registers.

use super::plain::{WIDTH, adjust, store};
use super::{Part, Place};
use std::arch::x86_64::{
    __m256, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

type Sums<const ROWS: usize> = [[__m256; 2]; ROWS];

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_f32<const ROWS: usize>(
    mut sums: Sums<ROWS>,
    left: *const f32,
    stride: usize,
    k: usize,
    panel: *const f32,
) -> Sums<ROWS> {
    for p in 0..k {
        // SAFETY: panels hold k rows of two registers, left operands ROWS rows of k entries.
        let b = unsafe { [_mm256_loadu_ps(panel.add(p * WIDTH)), _mm256_loadu_ps(panel.add(p * WIDTH + 8))] };
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let a = unsafe { _mm256_broadcast_ss(&*left.add(i * stride + p)) };
            for (s, b) in sums.iter_mut().zip(b) {
                *s = _mm256_fmadd_ps(a, b, *s);
            }
        }
    }
    sums
}

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile<const ROWS: usize>(parts: &[Part], at: usize, place: Place, columns: usize) {
    let mut wide: Sums<ROWS> = [[_mm256_setzero_ps(); 2]; ROWS];
    let mut sums = [[0f32; WIDTH]; ROWS];
    // What is no product comes after the products.
    let products = parts.iter().take_while(|part| matches!(part, Part::F32 { .. })).count();
    for part in &parts[..products] {
        if let Part::F32 { left, stride, k, panel } = part.down(at) {
            // SAFETY: the caller's promise.
            wide = unsafe { add_f32(wide, left, stride, k, panel) };
        }
    }
    for (sums, wide) in sums.iter_mut().zip(wide) {
        // SAFETY: 16 entries.
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), wide[0]);
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), wide[1]);
        }
    }
    for part in &parts[products..] {
        // SAFETY: the caller's promise.
        unsafe { adjust(&mut sums, part.down(at), columns) };
    }
    // SAFETY: the caller's promise.
    unsafe { store(&sums, place, columns) }
}
