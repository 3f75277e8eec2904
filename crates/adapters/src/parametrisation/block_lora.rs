//! Block-LoRA: LoRA cut into blocks of ranks that share one down-projection.
//!
//! Equation: y = W x + s (B_1 + ... + B_n) A x, with s = alpha / r, or alpha / sqrt(r) when rank-stabilised
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [r / n, d_in], B [n, d_out, r / n] trained
//! Source:   arXiv 2501.16720; as its abstract has it, sharing A turns n products into one product with a sum. All B_i have one
//!           gradient, so that under any elementwise optimiser the method is LoRA of rank r / n with n times the learning rate on B
//! Cost:     2 r / n (d_in + d_out) FLOPs a token forward, twice that backward; r / n d_in + r d_out parameters a layer

use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site, checked_dropout};
use crate::low_rank::LowRankView;
use crate::parameter::Role;
use crate::{Error, Flow, ParameterMap, Result, random};

/// How Block-LoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockLora {
    /// Rank r before sharing.
    pub r: usize,
    /// Number n of blocks; it divides r.
    pub blocks: usize,
    /// Numerator of the scaling alpha / r.
    pub alpha: f64,
    /// Scale by alpha / sqrt(r) instead of alpha / r.
    pub rslora: bool,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
}

impl Default for BlockLora {
    fn default() -> Self {
        Self { r: 8, blocks: 2, alpha: 16.0, rslora: false, dropout: 0.0 }
    }
}

impl Method for BlockLora {
    type Layer = BlockLoraLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<BlockLoraLayer> {
        site.refuse_lookup("block-lora")?;
        let (r, n) = (site.checked_rank()?, self.blocks);
        if n == 0 || r % n != 0 {
            return Err(Error::config("blocks", format!("{}: {n} blocks do not divide the rank {r}", site.path)));
        }
        let bound = 1.0 / (site.d_in as f64).sqrt();
        let shape = (r / n, site.d_in);
        Ok(BlockLoraLayer {
            path: site.path.clone(),
            a: init.trainable("block_A", shape, |rng, shape, device| random::uniform(rng, bound, shape, device))?,
            b: init.zeros("block_B", (n, site.d_out, r / n))?,
            scale: site.alpha / if self.rslora { (r as f64).sqrt() } else { r as f64 },
            dropout: checked_dropout(self.dropout)?,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn examples() -> Vec<(String, Self)> {
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("eight arms".to_owned(), Self { r: 8, blocks: 8, rslora: true, ..Self::default() }),
            ("dropout".to_owned(), Self { r: 6, blocks: 3, dropout: 0.4, ..Self::default() }),
        ]
    }
}

/// A and the B of every block at one site.
#[derive(Debug)]
pub struct BlockLoraLayer {
    path: String,
    a: Tensor,
    b: Tensor,
    scale: f64,
    dropout: f64,
}

impl Adapter for BlockLoraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view()?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push_as("block_A", &self.a, true, Role::Down);
        map.push_as("block_B", &self.b, true, Role::Up);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view().map(Some)
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

impl BlockLoraLayer {
    fn view(&self) -> Result<LowRankView> {
        Ok(LowRankView::new(&self.a, &self.b.sum(0)?, self.scale))
    }
}
