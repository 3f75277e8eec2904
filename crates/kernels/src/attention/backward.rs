//! The backward pass: scores recomputed tile by tile, one piece per sequence and kv head.
//!
//! Equation: p = e^(s - lnsum); dv = p^T g; dp = g v^T; ds = p (dp - sum(g o)) (1 - (s / c)^2 if capped);
//!           dq = scale ds k; dk = scale ds^T q
//! Order:    query tiles outside, key tiles inside, both ascending, so sums have a fixed order

use super::cpu::{KEYS, add_mask, pack, pack_transposed, soft_cap, tokens_per_tile};
use super::mask::{Rules, Visible};
use super::{AttentionSpec, Dims};
use crate::element::{Element, zeros};
use crate::matmul::{Matrix, multiply};
use crate::parallel;
use crate::simd::multiversion;
use crate::vector::dot;

/// What the forward pass had and gave.
pub(super) struct Saved<'a, T> {
    pub(super) q: &'a [T],
    pub(super) k: &'a [T],
    pub(super) v: &'a [T],
    pub(super) out: &'a [T],
    pub(super) g: &'a [T],
    pub(super) log_sums: &'a [f32],
}

/// Which gradients are wanted.
#[derive(Clone, Copy)]
pub(super) struct Want {
    pub(super) q: bool,
    pub(super) k: bool,
    pub(super) v: bool,
}

multiversion! {
    /// s <- p = e^(s - shift); dp <- ds = p (dp - delta), times the slope of the soft cap at the capped score `slope`.
    fn probabilities[FMA](s: &mut [f32], shift: f32, dp: &mut [f32], delta: f32, slope: &[f32]) {
        if slope.is_empty() {
            for (s, dp) in s.iter_mut().zip(dp) {
                let p = crate::math::exp::<FMA>(*s - shift);
                *s = p;
                *dp = p * (*dp - delta);
            }
        } else {
            for ((s, dp), slope) in s.iter_mut().zip(dp).zip(slope) {
                let p = crate::math::exp::<FMA>(*s - shift);
                *s = p;
                *dp = p * (*dp - delta) * slope;
            }
        }
    }
}

/// The gradients of one kv head: dq [tq, group, d], dk [tk, d], dv [tk, dv]; empty where not wanted.
struct Head {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

type Gradients<T> = (Option<Vec<T>>, Option<Vec<T>>, Option<Vec<T>>);

/// The wanted gradients, shaped like q, k and v.
pub(super) fn backward<T: Element>(
    dims: &Dims,
    spec: &AttentionSpec,
    saved: &Saved<'_, T>,
    want: Want,
) -> Gradients<T> {
    let Dims { b, tq, tk, h, kv, d, dv, .. } = *dims;
    let rules = Rules::new(*dims, spec);
    let heads = parallel::map(b * kv, b * tq * tk * h * (d + dv) / 16, |i| {
        head_gradients(dims, spec, &rules, saved, want, i / kv, i % kv)
    });
    let gather = |wanted: bool, t: usize, row: usize, part: fn(&Head) -> &Vec<f32>| {
        wanted.then(|| {
            let mut out = zeros::<T>(b * t * kv * row);
            let work = out.len();
            parallel::chunks(&mut out, kv * row, work, |at, out| {
                for (head, out) in out.chunks_mut(row).enumerate() {
                    T::store(&part(&heads[at / t * kv + head])[at % t * row..][..row], out);
                }
            });
            out
        })
    };
    (
        gather(want.q, tq, dims.group() * d, |head| &head.dq),
        gather(want.k, tk, d, |head| &head.dk),
        gather(want.v, tk, dv, |head| &head.dv),
    )
}

fn head_gradients<T: Element>(
    dims: &Dims,
    spec: &AttentionSpec,
    rules: &Rules<'_>,
    saved: &Saved<'_, T>,
    want: Want,
    at: usize,
    head: usize,
) -> Head {
    let Dims { tq, tk, h, kv, d, dv, .. } = *dims;
    let (group, per, scale) = (dims.group(), tokens_per_tile(dims), spec.scale as f32);
    let need = |wanted: bool, len: usize| vec![0f32; if wanted { len } else { 0 }];
    let mut grads = Head { dq: need(want.q, tq * group * d), dk: need(want.k, tk * d), dv: need(want.v, tk * dv) };
    // Keys of this head as f32, as rows and as columns, and values as columns, once.
    let (mut keys, mut columns, mut values) = (vec![0f32; tk * d], vec![0f32; tk * d], vec![0f32; tk * dv]);
    if tk > 0 {
        let from = &saved.k[(at * tk * kv + head) * d..];
        pack(from, kv * d, d, tk, &mut keys);
        pack_transposed(from, kv * d, d, tk, &mut columns);
        pack_transposed(&saved.v[(at * tk * kv + head) * dv..], kv * dv, dv, tk, &mut values);
    }
    let rows = per * group;
    let (mut q, mut g, mut o) = (vec![0f32; rows * d], vec![0f32; rows * dv], vec![0f32; rows * dv]);
    let (mut s, mut dp, mut slope) = (vec![0f32; rows * KEYS], vec![0f32; rows * KEYS], vec![]);
    let mut mask = vec![0f32; per * KEYS];
    if spec.softcap.is_some() {
        slope.resize(rows * KEYS, 0f32);
    }
    for first in (0..tq).step_by(per) {
        let queries = first..(first + per).min(tq);
        let rows = queries.len() * group;
        let place = (at * tq + first) * h + head * group;
        pack(&saved.q[place * d..], h * d, group * d, queries.len(), &mut q);
        pack(&saved.g[place * dv..], h * dv, group * dv, queries.len(), &mut g);
        pack(&saved.out[place * dv..], h * dv, group * dv, queries.len(), &mut o);
        let delta: Vec<f32> = g.chunks(dv).zip(o.chunks(dv)).take(rows).map(|(g, o)| dot(g, o)).collect();
        let span = rules.span(&queries);
        for start in span.clone().step_by(KEYS) {
            let range = start..(start + KEYS).min(span.end);
            let n = range.len();
            let visible = rules.tile(at, queries.clone(), range.clone(), &mut mask);
            if visible == Visible::Nothing {
                continue;
            }
            let k = Matrix::rows(&keys[start * d..range.end * d], d);
            let (kt, vt) = (Matrix::rows(&columns[start..], tk), Matrix::rows(&values[start..], tk));
            multiply((rows, n, d), &mut s, n, false, Matrix::rows(&q, d), kt, scale);
            if want.q || want.k {
                multiply((rows, n, dv), &mut dp, n, false, Matrix::rows(&g, dv), vt, 1.0);
            }
            if let Some(cap) = spec.softcap {
                soft_cap(&mut s[..rows * n], cap as f32);
                let inverse = 1.0 / cap as f32;
                slope.iter_mut().zip(&s[..rows * n]).for_each(|(f, s)| *f = 1.0 - (s * inverse) * (s * inverse));
            }
            for (row, (s, dp)) in s.chunks_mut(n).zip(dp.chunks_mut(n)).take(rows).enumerate() {
                if visible == Visible::Some {
                    add_mask(s, &mask[row / group * n..][..n]);
                }
                let log_sum = saved.log_sums[place + row / group * h + row % group];
                let slope = if slope.is_empty() { &[][..] } else { &slope[row * n..][..n] };
                probabilities(s, log_sum, dp, delta[row], slope);
            }
            let (p, ds) = (Matrix::rows(&s, n), Matrix::rows(&dp, n));
            if want.v {
                let into = &mut grads.dv[start * dv..range.end * dv];
                multiply((n, dv, rows), into, dv, true, p.t(), Matrix::rows(&g, dv), 1.0);
            }
            if want.k {
                let into = &mut grads.dk[start * d..range.end * d];
                multiply((n, d, rows), into, d, true, ds.t(), Matrix::rows(&q, d), scale);
            }
            if want.q {
                let into = &mut grads.dq[first * group * d..][..rows * d];
                multiply((rows, d, n), into, d, true, ds, k, scale);
            }
        }
    }
    grads
}
