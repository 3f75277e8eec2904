//! The forward pass for one query token: dot products straight from the stored keys and values.
//!
//! Keys are cut into fixed runs; each run of each kv head gives (maximum, sum, weighted values), merged in order.
//! Source: the split over keys is that of Flash-Decoding.

use super::cpu::soft_cap;
use super::mask::Rules;
use super::{AttentionSpec, Dims};
use crate::element::{Element, zeros};
use crate::parallel;
use crate::vector::{axpy, dot, exp_in_place, max, scale};

/// Keys a run.
const RUN: usize = 512;

/// Per query head of a group: maximum, sum and weighted values `[dv]` of one run.
struct Partial {
    stats: Vec<(f32, f32)>,
    values: Vec<f32>,
}

/// Output [b, 1, h, dv] and ln-sums [b, 1, h].
pub(super) fn forward<T: Element>(dims: &Dims, spec: &AttentionSpec, q: &[T], k: &[T], v: &[T]) -> (Vec<T>, Vec<f32>) {
    let Dims { b, tk, room, h, kv, d, dv, .. } = *dims;
    let group = dims.group();
    let rules = Rules::new(*dims, spec);
    let span = rules.range(0);
    let runs = span.len().div_ceil(RUN);
    let partials = parallel::map(b * kv * runs, b * h * tk * (d + dv) / 8, |task| {
        let (at, head, run) = (task / (kv * runs), task / runs % kv, task % runs);
        let start = span.start + run * RUN;
        let keys = start..(start + RUN).min(span.end);
        let mut sq = vec![0f32; group * d];
        T::load(&q[(at * h + head * group) * d..][..group * d], &mut sq);
        let n = keys.len();
        let mut scores = vec![f32::NEG_INFINITY; group * n];
        let mut scratch = T::scratch(d.max(dv));
        let seen: Vec<bool> = keys.clone().map(|j| rules.sees(at, 0, j)).collect();
        for (i, j) in keys.clone().enumerate().filter(|(i, _)| seen[*i]) {
            let key = T::view(&k[((at * room + j) * kv + head) * d..][..d], &mut scratch);
            for (g, q) in sq.chunks(d).enumerate() {
                scores[g * n + i] = spec.scale as f32 * dot(q, key);
            }
        }
        if let Some(cap) = spec.softcap {
            soft_cap(&mut scores, cap as f32);
            for row in scores.chunks_mut(n) {
                row.iter_mut().zip(&seen).filter(|(_, seen)| !**seen).for_each(|(s, _)| *s = f32::NEG_INFINITY);
            }
        }
        let stats = scores
            .chunks_mut(n)
            .map(|s| {
                let top = max(s);
                (top, exp_in_place(s, if top == f32::NEG_INFINITY { 0.0 } else { top }))
            })
            .collect();
        let mut values = vec![0f32; group * dv];
        for (i, j) in keys.enumerate().filter(|(i, _)| seen[*i]) {
            let value = T::view(&v[((at * room + j) * kv + head) * dv..][..dv], &mut scratch);
            for (g, o) in values.chunks_mut(dv).enumerate() {
                axpy(scores[g * n + i], value, o);
            }
        }
        Partial { stats, values }
    });
    let mut out = zeros::<T>(b * h * dv);
    let mut log_sums = vec![f32::INFINITY; b * h];
    let mut o = vec![0f32; dv];
    for (place, (out, log_sum)) in out.chunks_mut(dv).zip(&mut log_sums).enumerate() {
        let (at, head, g) = (place / h, place % h / group, place % group);
        let parts = &partials[(at * kv + head) * runs..][..runs];
        let top = parts.iter().fold(f32::NEG_INFINITY, |m, p| p.stats[g].0.max(m));
        let (mut l, shift) = (0f32, if top == f32::NEG_INFINITY { 0.0 } else { top });
        o.fill(0.0);
        for part in parts {
            let (m, sum) = part.stats[g];
            let weight = (m - shift).exp();
            l += weight * sum;
            axpy(weight, &part.values[g * dv..][..dv], &mut o);
        }
        if l > 0.0 || l.is_nan() {
            scale(1.0 / l, &mut o);
            *log_sum = top + l.ln();
        }
        T::store(&o, out);
    }
    (out, log_sums)
}
