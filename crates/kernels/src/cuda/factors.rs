//! The two thin products of the way back of a group of low-rank products, which read the same rows, in one launch.
//!
//! Equation: slopes_i = s_i dy_i B_i, dB_i += s_i dy_i^T u_i
//! Shapes:   dy_i [n, outputs_i], u_i and slopes_i [n, rank_i], B_i [outputs_i, rank_i] bf16, dB_i [outputs_i, rank_i] f32
//! Cost:     4 n outputs_i rank_i FLOPs; dy is read once. The order of the additions is not fixed

use super::rows::aligned;
use super::{Gpu, View, launch_with};
use candle_core::Result;
use std::sync::PoisonError;

/// Columns of a strip and rows of a tile, as in `factors.cu`.
const COLUMNS: usize = 256;
const TILE: usize = 64;
/// Members that a launch takes, and 64-bit words of each.
const MEMBERS: usize = 3;
const WORDS: usize = 5;

/// One of the products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member {
    /// Addresses of B and, if it is wanted, of its gradient.
    pub(crate) b: u64,
    pub(crate) d_b: Option<u64>,
    /// First column in the rows, and the number of columns.
    pub(crate) first: usize,
    pub(crate) outputs: usize,
    /// First column in `u` and in the slopes, and the number of columns.
    pub(crate) row: usize,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Member {
    fn strips(&self) -> usize {
        self.outputs.div_ceil(COLUMNS)
    }

    /// Whether all accesses are of 16 bytes.
    fn is_taken(&self) -> bool {
        let counts = [self.first, self.outputs, self.row, self.rank];
        counts.iter().all(|c| c.is_multiple_of(8))
            && (8..=64).contains(&self.rank)
            && self.b.is_multiple_of(16)
            && self.d_b.unwrap_or(0).is_multiple_of(16)
    }
}

/// Writes the slopes of `members` and adds to the gradients of their B, for n rows `dy`. False, with nothing done, if the kernel
/// does not take the sizes or addresses.
///
/// # Errors
/// If the driver refuses memory or the launch.
pub(crate) fn backward(gpu: &Gpu, (dy, u, slopes): (View, View, View), n: usize, members: &[Member]) -> Result<bool> {
    let strips: usize = members.iter().map(Member::strips).sum();
    // The blocks of a range of rows wait for each other, so all of them must run at the same time: two on each processor.
    let blocks = 2 * usize::try_from(gpu.processors).unwrap_or(0);
    let fits = (1..=MEMBERS).contains(&members.len()) && (1..=blocks).contains(&strips) && n < 1 << 30;
    if gpu.capability != 90 || !fits || !aligned(&[dy, u, slopes]) || !members.iter().all(Member::is_taken) {
        return Ok(false);
    }
    let (name, width, stages) = match members.iter().map(|m| m.rank).max() {
        Some(0..=16) => ("factors_16", 16, 3),
        Some(17..=32) => ("factors_32", 32, 2),
        _ => ("factors_64", 64, 2),
    };
    let range = n.div_ceil(TILE).div_ceil(blocks / strips) * TILE;
    let ranges = n.div_ceil(range.max(1));
    let mut words = vec![0u64; MEMBERS * WORDS];
    let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
    let mut strip = 0;
    for (i, to) in words.chunks_mut(WORDS).enumerate() {
        let Some(m) = members.get(i) else {
            // No strip is of a member that is not there.
            to[WORDS - 1] = pair(0, i32::MAX as usize);
            continue;
        };
        let scale = m.scale.to_bits() as usize;
        let fields = [m.b, m.d_b.unwrap_or(0), pair(m.first, m.outputs), pair(m.row, m.rank), pair(scale, strip)];
        to.copy_from_slice(&fields);
        strip += m.strips();
    }
    // Each launch leaves zeros behind it. The lock is held until the launch is in the stream, so that nobody frees them before.
    let mut zeros = gpu.zeros.lock().unwrap_or_else(PoisonError::into_inner);
    let (sums, counters) = (members.len() * n * width, members.len() * ranges);
    let held = match zeros.take().filter(|z| z.len() >= sums + counters) {
        Some(held) => held,
        None => gpu.zeros::<f32>(sums + counters)?,
    };
    let at = gpu.address(zeros.insert(held));
    let done = at + (sums * size_of::<f32>()) as u64;
    let shared = 2 * (stages * TILE * (COLUMNS + width) + COLUMNS * width);
    let grid = ((strips, ranges, 1), 128, shared);
    let words = words.into_boxed_slice();
    launch_with!(
        gpu,
        name,
        grid,
        dy.at,
        dy.stride,
        u.at,
        u.stride,
        slopes.at,
        slopes.stride,
        at,
        done,
        n,
        range,
        words
    )?;
    Ok(true)
}
