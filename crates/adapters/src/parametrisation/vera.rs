//! VeRA: one frozen random pair (A, B) shared by all layers; each layer trains two small vectors.
//!
//! Equation: y = W x + b * (B (d * (A x)))
//! Shapes:   x [.., d_in] -> y [.., d_out]; b `[d_out]`, d `[r]` trained; A [r, d_in], B [d_out, r] frozen, the leading parts of one
//!           pair that covers the widest layer
//! Source:   arXiv 2310.11454 eq. 2; d starts at `d_initial`, b at 0
//! Cost:     2 r (d_in + d_out) FLOPs a token forward, twice that backward; d_out + r parameters a layer

use std::sync::Arc;

use candle_core::{Device, Shape, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Shared, Site, checked_dropout};
use crate::formats::peft_config::PeftNames;
use crate::low_rank::LowRankView;
use crate::random::torch::TorchGenerator;
use crate::{Flow, ParameterMap, Result};

/// How VeRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vera {
    /// Rank r of the shared pair.
    pub r: usize,
    /// Initial value of every entry of d.
    pub d_initial: f64,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
    /// Seed of the shared pair, as PEFT draws it.
    pub projection_prng_key: u64,
    /// Whether files hold the shared pair, or only its seed.
    pub save_projection: bool,
}

impl Default for Vera {
    fn default() -> Self {
        Self { r: 256, d_initial: 0.1, dropout: 0.0, projection_prng_key: 0, save_projection: true }
    }
}

impl Vera {
    /// The `skip`-th and next values of the pair's generator as a Kaiming-uniform matrix [rows, columns].
    fn draw(&self, skip: usize, shape: &Shape, device: &Device) -> Result<Tensor> {
        let mut generator = TorchGenerator::new(self.projection_prng_key);
        generator.skip(skip);
        let bound = (6.0 / shape.dims()[1] as f64).sqrt();
        generator.uniform(bound, shape, device)
    }
}

impl Method for Vera {
    type Layer = VeraLayer;

    const PEFT: Option<PeftNames> =
        Some(PeftNames { kind: "VERA", keys: &[("dropout", "vera_dropout")], fixed: &[] });
    const TENSORS: &'static [&'static str] = &["vera_lambda_b", "vera_lambda_d"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<VeraLayer> {
        site.refuse_lookup("vera")?;
        let r = site.checked_rank()?;
        let dropout = checked_dropout(self.dropout)?;
        let (out, width) = init.widest;
        let kind = if self.save_projection { Shared::Saved } else { Shared::Remade };
        let a = init.shared("vera_A", (r, width), kind, |_, shape, device| self.draw(0, shape, device))?;
        let b = init.shared("vera_B", (out, r), kind, |_, shape, device| self.draw(r * width, shape, device))?;
        Ok(VeraLayer {
            path: site.path.clone(),
            a: a.narrow(1, 0, site.d_in)?,
            b: b.narrow(0, 0, site.d_out)?,
            d: init.constant("vera_lambda_d", r, self.d_initial)?,
            gain: init.zeros("vera_lambda_b", site.d_out)?,
            dropout,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, 0.0)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 5, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("seed alone".to_owned(), Self { save_projection: false, projection_prng_key: 7, ..small.clone() }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small }),
        ]
    }
}

/// The two vectors at one site, and its part of the shared pair.
#[derive(Debug)]
pub struct VeraLayer {
    path: String,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    gain: Tensor,
    dropout: f64,
}

impl Adapter for VeraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view()?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("vera_lambda_b", &self.gain, true);
        map.push("vera_lambda_d", &self.d, true);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view().map(Some)
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

impl VeraLayer {
    /// The product of diag(b) B and A with factors d per rank.
    fn view(&self) -> Result<LowRankView> {
        let b = self.b.broadcast_mul(&self.gain.unsqueeze(1)?)?;
        Ok(LowRankView::new(&self.a, &b, 1.0).rank_scale(&self.d))
    }
}
