//! Cross entropy on a CUDA device: losses of bf16 scores, which become their own gradient in place.
//!
//! Equation: loss = ln sum_j e^(x_j) - x_label;  x_j <- scale (softmax(x)_j - [j = label])
//! Shapes:   scores [rows, vocab] bf16, labels [rows] u32, losses [rows] f32
//! Cost:     one read and one write of the scores, for vocabularies up to 163840 on Hopper

use crate::cuda::rows::{aligned, blocks};
use crate::cuda::{Gpu, View, launch_with};
use candle_core::Result;

/// Threads a block.
const THREADS: usize = 512;

/// Chunks of 16 bytes that each thread of the only block of a processor may keep in shared memory.
fn slots(gpu: &Gpu) -> usize {
    match gpu.capability {
        90..110 => 28,
        80 | 87 => 19,
        _ => 11,
    }
}

/// losses`[i]` <- the cross entropy of row i of `scores` against label i; if `gradient`, the row becomes `scale` times the
/// gradient of its loss. `labels` and `losses` are addresses of `rows` u32 and f32. A label that is not below vocab gives
/// loss 0 and gradient 0.
///
/// # Errors
/// If the driver refuses the launch.
pub(crate) fn in_place(
    gpu: &Gpu,
    scores: View,
    labels: u64,
    losses: u64,
    scale: f32,
    gradient: bool,
    (rows, vocab): (usize, usize),
) -> Result<()> {
    blocks(Some(0), (rows, vocab))?;
    let (name, grid, slots) = if aligned(&[scores]) {
        // The kernel is always allowed the same shared memory: what it asks for must not depend on the first vocabulary.
        let slots = slots(gpu);
        let processors = usize::try_from(gpu.processors).unwrap_or(1);
        ("cross_entropy", ((rows.min(processors), 1, 1), THREADS, slots * THREADS * 16), slots)
    } else {
        ("cross_entropy_scalar", ((rows, 1, 1), THREADS, 0), 0)
    };
    launch_with!(gpu, name, grid, scores.at, scores.stride, labels, losses, scale, gradient, slots, rows, vocab)
}
