//! LoHa: the entrywise product of two low-rank matrices.
//!
//! Equation: y = W x + s ((B1 A1) * (B2 A2)) x, s = alpha / r. The product is B' A' of rank r^2, with B' the products of every
//!           column of B1 with every one of B2, A' those of the rows: taken so where that is less work than the dense change
//! Shapes:   x [.., d_in] -> y [.., d_out]; A1, A2 [r, d_in], B1, B2 [d_out, r] trained
//! Source:   FedPara arXiv 2108.06098 eq. 1, LyCORIS arXiv 2309.14859 section 3; B1, A1, B2 Kaiming-uniform, A2 = 0 (PEFT)
//! Cost:     2 r^2 (d_in + d_out) FLOPs a token forward, or 4 r d_in d_out a pass and 2 d_in d_out a token; 2 r (d_in + d_out)
//!           parameters a layer

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site};
use crate::formats::peft_config::PeftNames;
use crate::low_rank::LowRankView;
use crate::output_dropout::OutputDropout;
use crate::weight_space::product;
use crate::{Flow, ParameterMap, Result, random};

/// How LoHa is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loha {
    /// Rank r of each of the two matrices.
    pub r: usize,
    /// Scaling numerator.
    pub alpha: f64,
    /// Probability of dropping an output of the change while training.
    pub rank_dropout: f64,
    /// Probability of dropping a layer's change while training.
    pub module_dropout: f64,
}

impl Default for Loha {
    fn default() -> Self {
        Self { r: 8, alpha: 8.0, rank_dropout: 0.0, module_dropout: 0.0 }
    }
}

impl Method for Loha {
    type Layer = LohaLayer;

    const PEFT: Option<PeftNames> =
        Some(PeftNames { kind: "LOHA", keys: &[], fixed: &[("use_effective_conv2d", "false")] });
    const TENSORS: &'static [&'static str] = &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<LohaLayer> {
        site.refuse_lookup("loha")?;
        let r = site.checked_rank()?;
        let mut drawn = |name: &str, shape: (usize, usize)| {
            let bound = 1.0 / (shape.1 as f64).sqrt();
            init.trainable(name, shape, |rng, shape, device| random::uniform(rng, bound, shape, device))
        };
        let b1 = drawn("hada_w1_a", (site.d_out, r))?;
        let a1 = drawn("hada_w1_b", (r, site.d_in))?;
        let b2 = drawn("hada_w2_a", (site.d_out, r))?;
        Ok(LohaLayer {
            path: site.path.clone(),
            a: [a1, init.zeros("hada_w2_b", (r, site.d_in))?],
            b: [b1, b2],
            scale: site.alpha / r as f64,
            dropout: OutputDropout::new(self.rank_dropout, self.module_dropout, true)?,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 1, alpha: 2.0, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("rank 1".to_owned(), small.clone()),
            ("dropout".to_owned(), Self { rank_dropout: 0.3, ..small.clone() }),
            ("dense, dropout".to_owned(), Self { r: 4, rank_dropout: 0.2, module_dropout: 0.1, ..small }),
        ]
    }
}

/// The four factors at one site.
#[derive(Debug)]
pub struct LohaLayer {
    path: String,
    a: [Tensor; 2],
    b: [Tensor; 2],
    scale: f64,
    dropout: OutputDropout,
}

impl LohaLayer {
    /// Whether rank r^2 is less work than the dense change.
    fn is_low(&self) -> Result<bool> {
        let (r, d_in) = self.a[0].dims2()?;
        let d_out = self.b[0].dim(0)?;
        Ok(r * r * (d_in + d_out) <= d_in * d_out)
    }

    fn view(&self) -> Result<LowRankView> {
        let [a1, a2] = &self.a;
        let [b1, b2] = &self.b;
        let a = a1.unsqueeze(1)?.broadcast_mul(&a2.unsqueeze(0)?)?.flatten(0, 1)?;
        let b = b1.unsqueeze(2)?.broadcast_mul(&b2.unsqueeze(1)?)?.flatten(1, 2)?;
        Ok(LowRankView::new(&a, &b, self.scale))
    }

    /// Δ from factors of any dtype.
    fn dense(&self, of: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
        let [a1, a2] = [of(&self.a[0])?, of(&self.a[1])?];
        let [b1, b2] = [of(&self.b[0])?, of(&self.b[1])?];
        Ok(((b1 * self.scale)?.matmul(&a1)? * b2.matmul(&a2)?)?)
    }
}

impl Adapter for LohaLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let low = self.is_low()?;
        if low && !(flow.train && self.dropout() > 0.0) {
            return self.view()?.forward(base, x, None);
        }
        let change = match low {
            true => self.view()?.product(x)?,
            false => {
                let delta = self.dense(|t| Ok(t.clone()))?;
                product(&x.to_dtype(delta.dtype())?, &delta)?
            }
        };
        self.dropout.add(base, x, &change, flow, &self.path)
    }

    fn delta(&self, _base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        self.dense(|t| t.detach().to_dtype(DType::F32)).map(Some)
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("hada_w1_a", &self.b[0], true);
        map.push("hada_w1_b", &self.a[0], true);
        map.push("hada_w2_a", &self.b[1], true);
        map.push("hada_w2_b", &self.a[1], true);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.is_low()?.then(|| self.view()).transpose()
    }

    fn dropout(&self) -> f64 {
        self.dropout.probability()
    }
}
