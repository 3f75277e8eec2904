//! A tile in plain arrays, and what both narrow kernels share.

use super::{Part, Place};
use crate::simd::madd;

pub(super) const WIDTH: usize = 16;

/// The parts that are no products.
///
/// # Safety
/// As [`super::tile`].
pub(super) unsafe fn adjust<const ROWS: usize>(sums: &mut [[f32; WIDTH]; ROWS], part: Part, columns: usize) {
    for (i, sums) in sums.iter_mut().enumerate() {
        // SAFETY: one value a column, or rows as long as the output's.
        let values = unsafe {
            match part {
                Part::Shift(values) => std::slice::from_raw_parts(values, columns),
                Part::AddF32 { rows, stride } => std::slice::from_raw_parts(rows.add(i * stride), columns),
                Part::F32 { .. } => unreachable!("products are added elsewhere"),
                Part::Bf16 { .. } | Part::AddBf16 { .. } => unreachable!("bf16 products need AVX512-BF16"),
            }
        };
        sums.iter_mut().zip(values).for_each(|(s, v)| *s += v);
    }
}

/// Writes a tile.
///
/// # Safety
/// As [`super::tile`].
pub(super) unsafe fn store<const ROWS: usize>(sums: &[[f32; WIDTH]; ROWS], place: Place, columns: usize) {
    for (i, sums) in sums.iter().enumerate() {
        // SAFETY: the caller's promise on the place.
        unsafe {
            match place {
                Place::F32 { out, stride } => {
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), out.add(i * stride), columns);
                }
                Place::Bf16 { out, stride } => {
                    let out = std::slice::from_raw_parts_mut(out.add(i * stride), columns);
                    crate::vector::to_bf16(&sums[..columns], out);
                }
            }
        }
    }
}

/// Adds one product, 4 columns of accumulators at a time so that they stay in registers.
unsafe fn add_f32<const ROWS: usize>(
    mut sums: [[f32; WIDTH]; ROWS],
    left: *const f32,
    stride: usize,
    k: usize,
    panel: *const f32,
) -> [[f32; WIDTH]; ROWS] {
    const STRIP: usize = 4;
    for first in (0..WIDTH).step_by(STRIP) {
        let mut strip = [[0f32; STRIP]; ROWS];
        for (strip, sums) in strip.iter_mut().zip(&sums) {
            strip.copy_from_slice(&sums[first..first + STRIP]);
        }
        for p in 0..k {
            // SAFETY: panels hold k rows of WIDTH entries, left operands ROWS rows of k.
            let b = unsafe { panel.add(p * WIDTH + first).cast::<[f32; STRIP]>().read_unaligned() };
            for (i, strip) in strip.iter_mut().enumerate() {
                // SAFETY: as above.
                let a = unsafe { *left.add(i * stride + p) };
                for (s, b) in strip.iter_mut().zip(b) {
                    *s = madd::<{ cfg!(target_arch = "aarch64") }>(a, b, *s);
                }
            }
        }
        for (sums, strip) in sums.iter_mut().zip(&strip) {
            sums[first..first + STRIP].copy_from_slice(strip);
        }
    }
    sums
}

pub(super) unsafe fn tile<const ROWS: usize>(parts: &[Part], at: usize, place: Place, columns: usize) {
    let mut sums = [[0f32; WIDTH]; ROWS];
    for part in parts {
        match part.down(at) {
            // SAFETY: the caller's promise.
            Part::F32 { left, stride, k, panel } => sums = unsafe { add_f32(sums, left, stride, k, panel) },
            // SAFETY: as above.
            other => unsafe { adjust(&mut sums, other, columns) },
        }
    }
    // SAFETY: as above.
    unsafe { store(&sums, place, columns) }
}
