//! The innermost loops: a tile of the output kept in registers over the whole of all terms.
//!
//! AVX-512: 14 rows by 32 columns (28 accumulators), one broadcast of the left operand for two multiply-adds; bf16 pairs
//! through `vdpbf16ps`. AVX2: 6 rows by 16 columns. Elsewhere the same tile in plain arrays.

mod plain;
#[cfg(target_arch = "x86_64")]
mod v3;
#[cfg(target_arch = "x86_64")]
mod v4;

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
        Level::V3 => run!(v3, tile, 6, 4, 2, 1),
        Level::Baseline => run!(plain, tile, 6, 4, 2, 1),
    }
}
