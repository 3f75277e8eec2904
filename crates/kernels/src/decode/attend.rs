//! Attention of one new token a row over a cache: `cuda/kernels/attend.cuh`.

use super::phase::{Phase, Work};
use super::product::Product;
use crate::cuda::{View, address};
use candle_core::{Result, Tensor};
use half::bf16;

/// Heads, positions and scores of a block's attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) scale: f64,
    pub(super) window: Option<usize>,
}

impl Heads {
    /// Whether the kernel takes them.
    pub(super) fn fit(&self) -> bool {
        matches!(self.head_dim, 64 | 128) && self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads)
    }

    /// Query heads that one team of warps attends for, and warps of a team: one head a team, while there are teams for all.
    fn teams(&self, m: usize, processors: usize) -> (usize, usize) {
        let group = self.heads / self.kv_heads;
        let items = |together: usize| m * self.kv_heads * group.div_ceil(together);
        let together = [1, 2].into_iter().find(|g| *g >= group || items(*g) <= 2 * processors).unwrap_or(4);
        (together, if items(together) > processors { 4 } else { 8 })
    }

    /// Appends the keys and values of `qkv` [m, (heads + 2 kv) d] to a cache of keys and values [m, capacity, kv, d], and writes
    /// the attention of the queries to `out` [m, heads d], in tiles if its stride is 0; `half` angles turn a head.
    ///
    /// # Errors
    /// If tensors are not as they are described.
    pub(super) fn phase(
        &self,
        (m, processors): (usize, usize),
        (qkv, out): (View, View),
        (keys, values): (&Tensor, &Tensor),
        half: usize,
        next: Option<&Product>,
    ) -> Result<Phase> {
        let (a_next, next) = Product::parts(next)?;
        let (together, team) = self.teams(m, processors);
        let d = self.head_dim;
        Ok(Phase {
            work: Work::Attend,
            x: qkv.at,
            x_stride: qkv.stride,
            out: out.at,
            out_stride: out.stride,
            a_next,
            next,
            keys: address::<bf16>(keys)?,
            values: address::<bf16>(values)?,
            scale: self.scale,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: d,
            together,
            team,
            capacity: keys.dim(1)?,
            window: self.window.map_or(0, |w| w.min(i32::MAX as usize / 2)),
            half,
            // As `team_floats` in the kernel.
            scratch: 8 / team * (together * d + 2 * d + team * together * (d + 2)),
            ..Phase::default()
        })
    }
}
