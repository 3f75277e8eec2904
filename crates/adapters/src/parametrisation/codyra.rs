//! CoDyRA: LoRA with a trained gate for every rank, which the dynamics of the same name press to zero one by one.
//!
//! Equation: y = W x + B (w * (A x))
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [r, d_in], B [d_out, r], w `[r]` trained
//! Source:   arXiv 2412.01004 eq. 3 and its code: no factor alpha / r, w ~ N(0, 1)
//! Cost:     LoRA's; r (d_in + d_out + 1) parameters a layer

use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site, checked_dropout};
use crate::low_rank::LowRankView;
use crate::parameter::Role;
use crate::{Flow, ParameterMap, Result, random};

/// Where the gates start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gates {
    /// Drawn from N(0, 1), as published.
    #[default]
    Normal,
    /// All 1.
    Ones,
}

/// How CoDyRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Codyra {
    /// Rank r before any is given up.
    pub r: usize,
    /// Where the gates start.
    pub gates: Gates,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
}

impl Default for Codyra {
    fn default() -> Self {
        Self { r: 16, gates: Gates::Normal, dropout: 0.0 }
    }
}

impl Method for Codyra {
    type Layer = CodyraLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<CodyraLayer> {
        site.refuse_lookup("codyra")?;
        let r = site.checked_rank()?;
        let bound = 1.0 / (site.d_in as f64).sqrt();
        Ok(CodyraLayer {
            path: site.path.clone(),
            a: init.trainable("codyra_A", (r, site.d_in), |rng, shape, device| {
                random::uniform(rng, bound, shape, device)
            })?,
            b: init.zeros("codyra_B", (site.d_out, r))?,
            gates: init.trainable("codyra_gate", r, |rng, shape, device| match self.gates {
                Gates::Normal => random::normal(rng, 1.0, shape, device),
                Gates::Ones => Ok(Tensor::ones(shape, candle_core::DType::F32, device)?),
            })?,
            dropout: checked_dropout(self.dropout)?,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, 0.0)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 3, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("gates of one".to_owned(), Self { gates: Gates::Ones, ..small.clone() }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small }),
        ]
    }
}

/// A, B and the gates at one site.
#[derive(Debug)]
pub struct CodyraLayer {
    path: String,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    dropout: f64,
}

impl Adapter for CodyraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view().forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push_as("codyra_A", &self.a, true, Role::Down);
        map.push_as("codyra_B", &self.b, true, Role::Up);
        map.push_as("codyra_gate", &self.gates, true, Role::Gate);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        Ok(Some(self.view()))
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

impl CodyraLayer {
    fn view(&self) -> LowRankView {
        LowRankView::new(&self.a, &self.b, 1.0).rank_scale(&self.gates)
    }
}
