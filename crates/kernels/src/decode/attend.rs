//! Attention of one new token a row over a cache: `cuda/kernels/attend.cu`.

use super::product::Next;
use crate::cuda::graph::Launches;
use crate::cuda::{Arg, View, address};
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

/// The cache of a block and where rows are in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cache<'a> {
    /// [m, capacity, kv, d].
    pub(super) keys: &'a Tensor,
    pub(super) values: &'a Tensor,
    /// Addresses of u32 `[m]`: the new token's place, and the first place that is no padding.
    pub(super) places: u64,
    pub(super) firsts: u64,
    /// [capacity, r / 2].
    pub(super) rotary: (&'a Tensor, &'a Tensor),
}

impl Heads {
    /// Whether the kernels take them.
    pub(super) fn fit(&self) -> bool {
        matches!(self.head_dim, 64 | 128) && self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads)
    }

    /// Query heads of a block: as many as share keys, while there are blocks for half of the processors.
    fn together(&self, m: usize, processors: usize) -> usize {
        let group = self.heads / self.kv_heads;
        let enough = |g: &usize| *g < 2 * group && 2 * m * self.kv_heads * group.div_ceil(*g) >= processors;
        [8, 4, 2].into_iter().find(enough).unwrap_or(1)
    }

    /// Appends the keys and values of `qkv` [m, (heads + 2 kv) d] to the cache, and writes the attention of the queries to `out`
    /// [m, heads d]; adds the A x of the next product to zeros.
    ///
    /// # Errors
    /// If the driver refuses the launch.
    pub(super) fn launch(
        &self,
        on: &Launches<'_>,
        m: usize,
        (qkv, out): (View, View),
        cache: &Cache<'_>,
        next: Option<&Next<'_>>,
    ) -> Result<()> {
        let (a_next, u_next, next) = Next::parts(next)?;
        let (capacity, half) = (cache.keys.dim(1)?, cache.rotary.0.dim(1)?);
        let together = self.together(m, on.gpu.processors as usize);
        let name = match (self.head_dim, together) {
            (64, 1) => "attend_64_1",
            (64, 2) => "attend_64_2",
            (64, 4) => "attend_64_4",
            (64, _) => "attend_64_8",
            (_, 1) => "attend_128_1",
            (_, 2) => "attend_128_2",
            (_, 4) => "attend_128_4",
            _ => "attend_128_8",
        };
        let window = self.window.map_or(0, |w| i32::try_from(w).unwrap_or(i32::MAX / 2).min(i32::MAX / 2));
        let runs = (self.heads / self.kv_heads).div_ceil(together);
        let args = [
            qkv.at.into(),
            qkv.stride.into(),
            self.heads.into(),
            self.kv_heads.into(),
            address::<bf16>(cache.keys)?.into(),
            address::<bf16>(cache.values)?.into(),
            capacity.into(),
            cache.places.into(),
            cache.firsts.into(),
            address::<f32>(cache.rotary.0)?.into(),
            address::<f32>(cache.rotary.1)?.into(),
            half.into(),
            self.scale.into(),
            window.into(),
            out.at.into(),
            out.stride.into(),
            a_next.into(),
            u_next.into(),
            Arg::from(next),
        ];
        on.launch(name, ((self.kv_heads, m, runs), 256, 0), true, &args)
    }
}
