//! The forward pass in tiles with a running maximum and sum (online softmax).
//!
//! Equation: per tile m' = max(m, max s), p = e^(s - m'), l' = l e^(m - m') + sum p, o' = o e^(m - m') + p V;
//!           at the end o / l and ln-sum m + ln l
//! Pieces:   one per sequence and tile of query tokens, all heads; each owns a contiguous part of the output. Keys (transposed)
//!           and values of each head are laid out in f32 once, for all pieces

use super::cpu::{KEYS, add_mask, pack, pack_transposed, soft_cap, tokens_per_tile};
use super::mask::{Rules, Visible};
use super::{AttentionSpec, Dims};
use crate::element::{Element, zeros};
use crate::matmul::{Matrix, multiply};
use crate::parallel;
use crate::vector::{exp_in_place, max, scale};
use std::ops::Range;

/// Output [b, tq, h, dv] and ln-sums [b, tq, h].
pub(super) fn forward<T: Element>(dims: &Dims, spec: &AttentionSpec, q: &[T], k: &[T], v: &[T]) -> (Vec<T>, Vec<f32>) {
    let Dims { b, tq, tk, room, h, kv, d, dv } = *dims;
    let mut out = zeros::<T>(b * tq * h * dv);
    let mut log_sums = vec![f32::INFINITY; b * tq * h];
    let rules = Rules::new(*dims, spec);
    let per = tokens_per_tile(dims);
    let mut pieces = Vec::new();
    if out.is_empty() {
        return (out, log_sums);
    }
    for (at, (out, log_sums)) in out.chunks_mut(tq * h * dv).zip(log_sums.chunks_mut(tq * h)).enumerate() {
        for (i, piece) in out.chunks_mut(per * h * dv).zip(log_sums.chunks_mut(per * h)).enumerate() {
            pieces.push((at, i * per, piece.0, piece.1));
        }
    }
    let mut panels = vec![0f32; b * kv * tk * (d + dv)];
    let work = panels.len();
    parallel::chunks(&mut panels, tk * (d + dv), work, |i, panel| {
        let (keys, values) = panel.split_at_mut(tk * d);
        let (at, head) = (i / kv, i % kv);
        pack_transposed(&k[(at * room * kv + head) * d..], kv * d, d, tk, keys);
        pack(&v[(at * room * kv + head) * dv..], kv * dv, dv, tk, values);
    });
    parallel::tasks(pieces, b * tq * tk * h * (d + dv) / 16, |(at, first, out, log_sums)| {
        let queries = first..first + log_sums.len() / h;
        let mut tile = Tile::new(dims, queries.len());
        for head in 0..dims.kv {
            let panel = &panels[(at * kv + head) * tk * (d + dv)..][..tk * (d + dv)];
            tile.run(dims, spec, &rules, at, queries.clone(), head, q, panel);
            tile.finish(dims, head, out, log_sums);
        }
    });
    (out, log_sums)
}

/// Scratch of one piece.
struct Tile {
    q: Vec<f32>,
    s: Vec<f32>,
    mask: Vec<f32>,
    o: Vec<f32>,
    /// Running maximum and sum of each row.
    stats: Vec<(f32, f32)>,
}

impl Tile {
    fn new(dims: &Dims, tokens: usize) -> Self {
        let rows = tokens * dims.group();
        Self {
            q: vec![0.0; rows * dims.d],
            s: vec![0.0; rows * KEYS],
            mask: vec![0.0; tokens * KEYS],
            o: vec![0.0; rows * dims.dv],
            stats: vec![(f32::NEG_INFINITY, 0.0); rows],
        }
    }

    /// Attends the queries of one kv head's group to all keys they see.
    #[allow(clippy::too_many_arguments)]
    fn run<T: Element>(
        &mut self,
        dims: &Dims,
        spec: &AttentionSpec,
        rules: &Rules<'_>,
        at: usize,
        queries: Range<usize>,
        head: usize,
        q: &[T],
        panel: &[f32],
    ) {
        let Dims { tq, tk, h, d, dv, .. } = *dims;
        let (k, v) = panel.split_at(tk * d);
        let group = dims.group();
        let rows = queries.len() * group;
        self.o.fill(0.0);
        self.stats.fill((f32::NEG_INFINITY, 0.0));
        let from = &q[((at * tq + queries.start) * h + head * group) * d..];
        pack(from, h * d, group * d, queries.len(), &mut self.q);
        let span = rules.span(&queries);
        for start in span.clone().step_by(KEYS) {
            let keys = start..(start + KEYS).min(span.end);
            let n = keys.len();
            let visible = rules.tile(at, queries.clone(), keys, &mut self.mask);
            if visible == Visible::Nothing {
                continue;
            }
            let (qm, km) = (Matrix::rows(&self.q, d), Matrix::rows(&k[start..], tk));
            multiply((rows, n, d), &mut self.s, n, false, qm, km, spec.scale as f32);
            if let Some(cap) = spec.softcap {
                soft_cap(&mut self.s[..rows * n], cap as f32);
            }
            for (row, s) in self.s.chunks_mut(n).take(rows).enumerate() {
                if visible == Visible::Some {
                    add_mask(s, &self.mask[row / group * n..][..n]);
                }
                let (m, l) = self.stats[row];
                let top = max(s).max(m);
                // A row that has seen nothing yet: every score is -inf, every weight zero.
                let shift = if top == f32::NEG_INFINITY { 0.0 } else { top };
                let sum = exp_in_place(s, shift);
                let decay = if m == top { 1.0 } else { (m - shift).exp() };
                if decay != 1.0 && l != 0.0 {
                    scale(decay, &mut self.o[row * dv..][..dv]);
                }
                self.stats[row] = (top, l * decay + sum);
            }
            let (sm, vm) = (Matrix::rows(&self.s, n), Matrix::rows(&v[start * dv..], dv));
            multiply((rows, dv, n), &mut self.o, dv, true, sm, vm, 1.0);
        }
    }

    /// Normalises and writes the rows of kv head `head` to the piece's output.
    fn finish<T: Element>(&mut self, dims: &Dims, head: usize, out: &mut [T], log_sums: &mut [f32]) {
        let Dims { h, dv, .. } = *dims;
        let group = dims.group();
        for (row, (o, &(m, l))) in self.o.chunks_mut(dv).zip(&self.stats).enumerate() {
            let place = row / group * h + head * group + row % group;
            if l > 0.0 || l.is_nan() {
                scale(1.0 / l, o);
                log_sums[place] = m + l.ln();
            }
            T::store(o, &mut out[place * dv..][..dv]);
        }
    }
}
