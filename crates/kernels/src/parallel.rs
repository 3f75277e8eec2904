//! Cutting work into pieces whose borders depend on shapes only, run on the current rayon pool.

use rayon::prelude::*;

/// Pieces with fewer entries than this in all are not worth waking threads for.
const SERIAL_BELOW: usize = 1 << 14;

/// Whether `work` (entries touched, or a like measure) is worth several threads.
pub(crate) fn worth(work: usize) -> bool {
    work >= SERIAL_BELOW
}

/// Rows of `width` entries that make a piece of about 8192 entries, at least `least`.
pub(crate) fn rows_per_piece(width: usize, least: usize) -> usize {
    ((1 << 13) / width.max(1)).max(least)
}

/// `f(i, piece i of out)` for pieces of `size` entries.
pub(crate) fn chunks<T: Send>(out: &mut [T], size: usize, work: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let size = size.max(1);
    if worth(work) {
        out.par_chunks_mut(size).enumerate().for_each(|(i, piece)| f(i, piece));
    } else {
        out.chunks_mut(size).enumerate().for_each(|(i, piece)| f(i, piece));
    }
}

/// `f(task)` for each task, each of which owns what it writes.
pub(crate) fn tasks<T: Send>(tasks: Vec<T>, work: usize, f: impl Fn(T) + Sync + Send) {
    if worth(work) && tasks.len() > 1 {
        tasks.into_par_iter().for_each(f);
    } else {
        tasks.into_iter().for_each(f);
    }
}

/// `f(i)` for i in 0..count, collected in order.
pub(crate) fn map<R: Send>(count: usize, work: usize, f: impl Fn(usize) -> R + Sync + Send) -> Vec<R> {
    if worth(work) && count > 1 { (0..count).into_par_iter().map(f).collect() } else { (0..count).map(f).collect() }
}

/// An optional slice cut into `count` optional pieces of `size` entries.
pub(crate) fn split<T>(out: Option<&mut [T]>, size: usize, count: usize) -> Vec<Option<&mut [T]>> {
    match out {
        Some(out) => out.chunks_mut(size.max(1)).map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}
