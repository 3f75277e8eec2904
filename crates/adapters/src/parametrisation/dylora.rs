//! DyLoRA: a low-rank product whose first components work by themselves, at any rank up to the trained one.
//!
//! Equation: y = W x + s_b B_b A_b x, the first b rows of A and columns of B; s_b = alpha / b, or alpha / r with `scale = constant`
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [r, d_in], B [d_out, r] trained; b from 1 to r
//! Source:   arXiv 2210.07558 eq. 7; the rank of a training pass travels beside the activations, `rank` is that of all other passes
//! Cost:     2 b (d_in + d_out) FLOPs a token forward, twice that backward; r (d_in + d_out) parameters a layer

use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use super::MethodConfig;
use super::lora::{Lora, LoraLayer};
use crate::adapter::{Adapter, Cut, Init, Method, Site};
use crate::flow::Nested;
use crate::low_rank::LowRankView;
use crate::parameter::Role;
use crate::{Error, Flow, ParameterMap, Result};

/// What the scale is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Over {
    /// The rank in use.
    #[default]
    Used,
    /// The trained rank.
    Constant,
}

/// How DyLoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dylora {
    /// Trained rank r.
    pub r: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// What alpha is over: used, constant.
    pub scale: Over,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
    /// Rank in use where none is drawn; 0: the trained one.
    pub rank: usize,
}

impl Default for Dylora {
    fn default() -> Self {
        Self { r: 8, alpha: 16.0, scale: Over::Used, dropout: 0.0, rank: 0 }
    }
}

impl Method for Dylora {
    type Layer = DyloraLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<DyloraLayer> {
        site.refuse_lookup("dylora")?;
        let most = self.r.max(site.checked_rank()?);
        if self.rank > most {
            return Err(Error::config("rank", format!("{}: rank {} of a product of {most}", site.path, self.rank)));
        }
        let lora = Lora { r: self.r, alpha: self.alpha, dropout: self.dropout, ..Lora::default() };
        let product = lora.factors(site, init)?;
        let rank = if self.rank == 0 { site.rank } else { self.rank.min(site.rank) };
        Ok(DyloraLayer { product, alpha: site.alpha, trained: site.rank, over: self.scale, rank })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 4, alpha: 3.0, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("a smaller rank".to_owned(), Self { rank: 2, ..small.clone() }),
            ("constant scale, a smaller rank".to_owned(), Self { scale: Over::Constant, rank: 3, ..small.clone() }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small }),
        ]
    }

    fn cut(&self, rank: usize) -> Option<MethodConfig> {
        let r = rank.min(self.r);
        Some(MethodConfig::Lora(Lora { r, alpha: self.alpha, dropout: self.dropout, ..Lora::default() }))
    }
}

/// A and B at one site, and the rank in use.
#[derive(Debug)]
pub struct DyloraLayer {
    product: LoraLayer,
    alpha: f64,
    trained: usize,
    over: Over,
    rank: usize,
}

impl DyloraLayer {
    fn scale(&self, rank: usize) -> f64 {
        match self.over {
            Over::Used => self.alpha / rank as f64,
            Over::Constant => self.alpha / self.trained as f64,
        }
    }

    /// The first components.
    fn view(&self, nested: Nested) -> Result<LowRankView> {
        let rank = nested.rank.clamp(1, self.trained);
        let (a, b) = (&self.product.a, &self.product.b);
        if rank == self.trained && !nested.last_only {
            return Ok(LowRankView::new(a, b, self.scale(rank)));
        }
        let (a, b) = (a.narrow(0, 0, rank)?, b.narrow(1, 0, rank)?);
        if !nested.last_only || rank == 1 {
            return Ok(LowRankView::new(&a, &b, self.scale(rank)));
        }
        let last = rank - 1;
        let a = Tensor::cat(&[&a.narrow(0, 0, last)?.detach(), &a.narrow(0, last, 1)?], 0)?;
        let b = Tensor::cat(&[&b.narrow(1, 0, last)?.detach(), &b.narrow(1, last, 1)?], 1)?;
        Ok(LowRankView::new(&a, &b, self.scale(rank)))
    }
}

impl Adapter for DyloraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let Some(view) = self.low_rank_in(base, flow)? else { return Ok(base.forward(x)?) };
        view.forward(base, x, self.product.dropped(x, flow)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        self.product.parameters()
    }

    fn low_rank(&self, _: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view(Nested { rank: self.rank, last_only: false }).map(Some)
    }

    fn low_rank_in(&self, base: &Arc<FrozenWeight>, flow: &Flow) -> Result<Option<LowRankView>> {
        match flow.nested.filter(|_| flow.train) {
            Some(nested) => self.view(nested).map(Some),
            None => self.low_rank(base),
        }
    }

    fn dropout(&self) -> f64 {
        self.product.dropout
    }

    fn is_nested(&self) -> bool {
        true
    }

    /// The first `rank` components under a scale of alpha over their number.
    fn cut(&self, rank: usize) -> Result<Option<Cut>> {
        let rank = rank.clamp(1, self.trained);
        let view = self.view(Nested { rank, last_only: false })?;
        let factor = view.scale / (self.alpha / rank as f64);
        let b = if factor == 1.0 { view.b.detach() } else { (view.b.detach() * factor)? };
        let (name_a, name_b) = LoraLayer::names(false);
        let mut map = ParameterMap::new();
        map.push_as(name_a, &view.a.detach().contiguous()?, true, Role::Down);
        map.push_as(name_b, &b.contiguous()?, true, Role::Up);
        Ok(Some(Cut { rank, parameters: map }))
    }
}
