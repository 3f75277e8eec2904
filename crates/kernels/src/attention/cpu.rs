//! Attention on the CPU: the custom operation and what its passes share.
//!
//! Tiles: up to 64 query rows (tokens x heads of one kv head, so that keys are loaded once per group) by 64 keys.
//! A single query token takes the path of `decode`, without matrix products.

use super::{AttentionSpec, Dims, backward, decode, forward};
use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like};
use crate::math::tanh;
use crate::simd::multiversion;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType, bail};
use std::sync::OnceLock;

/// Keys a tile.
pub(super) const KEYS: usize = 64;
/// Query rows a tile, heads of a group counted.
pub(super) const ROWS: usize = 64;

multiversion! {
    /// s <- cap tanh(s / cap)
    fn soft_cap[FMA](s: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for s in s {
            *s = cap * tanh::<FMA>(*s * inverse);
        }
    }
}

multiversion! {
    /// s <- s + mask
    fn add_mask[FMA](s: &mut [f32], mask: &[f32]) {
        let _ = FMA;
        for (s, mask) in s.iter_mut().zip(mask) {
            *s += mask;
        }
    }
}

/// Copies `count` rows of `width` entries, `stride` apart in `from`, to f32 rows in `to`.
pub(super) fn pack<T: Element>(from: &[T], stride: usize, width: usize, count: usize, to: &mut [f32]) {
    for (i, row) in to.chunks_exact_mut(width).take(count).enumerate() {
        T::load(&from[i * stride..][..width], row);
    }
}

/// The same rows as the columns of `to` [width, count], so that products with them read along memory.
pub(super) fn pack_transposed<T: Element>(from: &[T], stride: usize, width: usize, count: usize, to: &mut [f32]) {
    const STRIP: usize = 16;
    let mut strip = vec![0f32; STRIP * width];
    for first in (0..count).step_by(STRIP) {
        let rows = STRIP.min(count - first);
        pack(&from[first * stride..], stride, width, rows, &mut strip);
        for (c, line) in to.chunks_exact_mut(count).take(width).enumerate() {
            line[first..first + rows].iter_mut().enumerate().for_each(|(r, entry)| *entry = strip[r * width + c]);
        }
    }
}

/// Query tokens a tile.
pub(super) fn tokens_per_tile(dims: &Dims) -> usize {
    (ROWS / dims.group()).max(1)
}

/// Output [b, tq, h, dv] and ln-sums [b, tq, h].
pub(crate) fn run<T: Element>(dims: &Dims, spec: &AttentionSpec, q: &[T], k: &[T], v: &[T]) -> (Vec<T>, Vec<f32>) {
    if dims.tq == 1 { decode::forward::<T>(dims, spec, q, k, v) } else { forward::forward::<T>(dims, spec, q, k, v) }
}

/// The gradients of q, k and v.
pub(crate) fn gradients<T: Element>(
    dims: &Dims,
    spec: &AttentionSpec,
    (q, k, v): (&[T], &[T], &[T]),
    (out, log_sums): (&[T], &[f32]),
    g: &[T],
) -> (Vec<T>, Vec<T>, Vec<T>) {
    let saved = backward::Saved { q, k, v, out, g, log_sums };
    let (dq, dk, dv) = backward::backward(dims, spec, &saved, backward::Want { q: true, k: true, v: true });
    (dq.unwrap_or_default(), dk.unwrap_or_default(), dv.unwrap_or_default())
}

/// Fused attention.
pub(super) struct Attention {
    pub(super) spec: AttentionSpec,
    /// ln sum_j e^(s_ij) [b, tq, h], set by the forward pass; +inf where a query sees nothing.
    pub(super) log_sums: OnceLock<Vec<f32>>,
}

fn dims_of(q: &[usize], k: &[usize], v: &[usize]) -> Result<Dims> {
    match Dims::of(q, k, v) {
        Some(dims) => Ok(dims),
        None => bail!("attention: shapes q {q:?}, k {k:?}, v {v:?} do not fit"),
    }
}

/// Places of each sequence in memory where [b, t, kv, d] is the first t of a longer cache.
pub(super) fn room(layout: &Layout) -> Option<usize> {
    let (&[_, t, heads, width], &[row, token, head, 1]) = (layout.dims(), layout.stride()) else { return None };
    let cached = head == width && token == heads * width && token > 0 && row % token == 0 && row / token > t;
    cached.then(|| row / token)
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut dims = dims_of(lq.dims(), lk.dims(), lv.dims())?;
        let in_cache = room(lk).zip(room(lv)).filter(|(k, v)| k == v).map(|(room, _)| room);
        let out = by_dtype!(q.dtype(), self.name(), T => {
            let q = slice::<T>(q, lq)?;
            let (k, v) = match in_cache {
                Some(room) => {
                    dims.room = room;
                    (T::cpu_storage_as_slice(k)?, T::cpu_storage_as_slice(v)?)
                }
                None => (slice::<T>(k, lk)?, slice::<T>(v, lv)?),
            };
            let (k, v) = match in_cache {
                Some(_) => (&k[lk.start_offset()..], &v[lv.start_offset()..]),
                None => (k, v),
            };
            let (out, log_sums) = run::<T>(&dims, &self.spec, q, k, v);
            let _ = self.log_sums.set(log_sums);
            <T as WithDType>::to_cpu_storage_owned(out)
        });
        Ok((out, Shape::from((dims.b, dims.tq, dims.h, dims.dv))))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dims = dims_of(q.dims(), k.dims(), v.dims())?;
        let Some(log_sums) = self.log_sums.get() else { bail!("attention: backward before forward") };
        let g = g.contiguous()?;
        let (guard_q, lq) = q.storage_and_layout();
        let (guard_k, lk) = k.storage_and_layout();
        let (guard_v, lv) = v.storage_and_layout();
        let (guard_o, lo) = out.storage_and_layout();
        let (guard_g, lg) = g.storage_and_layout();
        by_dtype!(q.dtype(), self.name(), T => {
            let saved = backward::Saved::<T> {
                q: cpu_slice(&guard_q, lq)?,
                k: cpu_slice(&guard_k, lk)?,
                v: cpu_slice(&guard_v, lv)?,
                out: cpu_slice(&guard_o, lo)?,
                g: cpu_slice(&guard_g, lg)?,
                log_sums,
            };
            let want = backward::Want { q: q.track_op(), k: k.track_op(), v: v.track_op() };
            let (dq, dk, dv) = backward::backward(&dims, &self.spec, &saved, want);
            Ok((
                dq.map(|x| tensor_like(x, q)).transpose()?,
                dk.map(|x| tensor_like(x, k)).transpose()?,
                dv.map(|x| tensor_like(x, v)).transpose()?,
            ))
        })
    }
}
