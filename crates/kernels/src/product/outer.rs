//! Sums of outer products over many rows: the gradients of thin factors.
//!
//! Equation: out[r, j] = sum over rows t of u[t, r] v[t, j]
//! Shapes:   u [m, r] with rows `stride` apart, v [m, n], out [r, n]
//! Cost:     2 m r n FLOPs; v is read in place, 16 columns at a time, once for every 16 r

use super::Multiply;
use crate::parallel;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Level, level};

const WIDTH: usize = 16;
const HEIGHT: usize = 16;

/// out [r, n] <- sum over rows of u v.
pub(crate) fn outer<T: Multiply>((m, r, n): (usize, usize, usize), u: &[f32], stride: usize, v: &[T], out: &mut [f32]) {
    assert!(v.len() == m * n && out.len() == r * n && (m == 0 || u.len() >= (m - 1) * stride + r), "outer: sizes");
    let panels = n.div_ceil(WIDTH);
    let blocks = parallel::map(panels, m * r * n / 16, |i| {
        let first = i * WIDTH;
        let columns = WIDTH.min(n - first);
        let mut block = vec![0f32; r * WIDTH];
        for (j, block) in block.chunks_mut(HEIGHT * WIDTH).enumerate() {
            let u = &u[(j * HEIGHT).min(u.len())..];
            tile((m, block.len() / WIDTH, columns), u, stride, &v[first.min(v.len())..], n, block);
        }
        block
    });
    for (i, block) in blocks.iter().enumerate() {
        let first = i * WIDTH;
        let columns = WIDTH.min(n - first);
        for (row, block) in out.chunks_exact_mut(n.max(1)).zip(block.chunks(WIDTH)) {
            row[first..first + columns].copy_from_slice(&block[..columns]);
        }
    }
}

/// out [n, r] <- the transpose of [`outer`].
pub(crate) fn outer_transposed<T: Multiply>(
    (m, r, n): (usize, usize, usize),
    u: &[f32],
    stride: usize,
    v: &[T],
    out: &mut [f32],
) {
    let mut rows = vec![0f32; r * n];
    outer((m, r, n), u, stride, v, &mut rows);
    for (i, row) in rows.chunks_exact(n.max(1)).enumerate() {
        out.iter_mut().skip(i).step_by(r).zip(row).for_each(|(d, v)| *d = *v);
    }
}

/// One block of up to 16 by 16 outputs.
fn tile<T: Multiply>(
    (m, rows, columns): (usize, usize, usize),
    u: &[f32],
    stride: usize,
    v: &[T],
    n: usize,
    block: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if matches!(level(), Level::V4 | Level::V4Bf16) && rows == HEIGHT && columns == WIDTH {
        let size = std::mem::size_of::<T>();
        if size == 4 {
            // SAFETY: the level was checked; `outer` checked that u and v hold m rows; entries of 4 bytes are f32.
            unsafe { v4::tile_f32(m, u.as_ptr(), stride, v.as_ptr().cast(), n, block) };
            return;
        }
        if T::DTYPE == candle_core::DType::BF16 {
            // SAFETY: as above; bf16 is its 16 bits.
            unsafe { v4::tile_bf16(m, u.as_ptr(), stride, v.as_ptr().cast(), n, block) };
            return;
        }
    }
    let mut scratch = [0f32; WIDTH];
    for t in 0..m {
        T::load(&v[t * n..][..columns], &mut scratch[..columns]);
        for (block, u) in block.chunks_exact_mut(WIDTH).zip(&u[t * stride..][..rows]) {
            crate::vector::axpy(*u, &scratch, block);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod v4 {
    use super::{HEIGHT, WIDTH};
    use std::arch::x86_64::{
        __m512, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    /// Rows that are asked of memory ahead of use.
    const AHEAD: usize = 12;

    macro_rules! kernel {
        ($name:ident, $type:ty, $load:expr) => {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            pub(super) unsafe fn $name(
                m: usize,
                u: *const f32,
                stride: usize,
                v: *const $type,
                n: usize,
                block: &mut [f32],
            ) {
                assert_eq!(block.len(), HEIGHT * WIDTH);
                let mut sums: [__m512; HEIGHT] = [_mm512_setzero_ps(); HEIGHT];
                for t in 0..m {
                    // SAFETY: u and v hold m rows; a prefetch may ask for any address.
                    unsafe {
                        _mm_prefetch::<_MM_HINT_T0>(v.wrapping_add((t + AHEAD) * n).cast());
                        let row: __m512 = $load(v.add(t * n));
                        for (r, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_fmadd_ps(_mm512_set1_ps(*u.add(t * stride + r)), row, *sum);
                        }
                    }
                }
                for (sum, row) in sums.iter().zip(block.chunks_exact_mut(WIDTH)) {
                    // SAFETY: 16 entries.
                    unsafe { _mm512_storeu_ps(row.as_mut_ptr(), *sum) };
                }
            }
        };
    }
    kernel!(tile_f32, f32, |p| _mm512_loadu_ps(p));
    kernel!(tile_bf16, u16, |p: *const u16| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
        _mm256_loadu_si256(p.cast())
    ))));
}
