//! RandLoRA: a full-rank change from many frozen random products, of which only diagonal factors are trained.
//!
//! Equation: dW = s M, or s M^T where d_in > d_out; M = sum_j B_j diag(l_j) A diag(g_j), j = 1 .. N = ceil(d / r)
//! Shapes:   d = min(d_in, d_out), D = max(d_in, d_out); A [r, d], B_j [D, r] frozen, the leading parts of one bank that covers the
//!           widest layer; l [r, N], g [N, d] trained
//! Source:   arXiv 2502.00987 eq. 4, s = alpha / (r sqrt(N)); PEFT has s = alpha / r and pairs l and g with the columns of B in
//!           another order, which the setting `peft` follows
//! Cost:     2 N r (d_in + d_out) FLOPs a token forward, of the order of the frozen product; N (r + d) parameters a layer

use std::sync::Arc;

use candle_core::{Device, Shape, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Init, Method, Shared, Site, checked_dropout};
use crate::formats::peft_config::{self, PeftNames};
use crate::low_rank::LowRankView;
use crate::{Error, Flow, ParameterMap, Result, random};

/// How RandLoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RandLora {
    /// Rank r of one random product. A larger one means fewer parameters.
    pub r: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// Probability of dropping an input of the change while training.
    pub dropout: f64,
    /// PEFT's pairing of factors and columns, and its scaling alpha / r.
    pub peft: bool,
    /// Entries of the bank are -1, 0 and 1 with probabilities 1/6, 2/3 and 1/6.
    pub sparse: bool,
    /// As `sparse`, with probability 1 / sqrt(D) of a sign.
    pub very_sparse: bool,
    /// Seed of the bank.
    pub projection_prng_key: u64,
    /// Whether files hold the bank, or only its seed (which only this program can draw from).
    pub save_projection: bool,
}

impl Default for RandLora {
    fn default() -> Self {
        Self {
            r: 32,
            alpha: 64.0,
            dropout: 0.0,
            peft: false,
            sparse: false,
            very_sparse: false,
            projection_prng_key: 0,
            save_projection: true,
        }
    }
}

const NAMES: PeftNames = PeftNames {
    kind: "RANDLORA",
    keys: &[("alpha", "randlora_alpha"), ("dropout", "randlora_dropout")],
    fixed: &[],
};

impl RandLora {
    /// One tensor of the bank with unit variance.
    fn draw(&self, name: &str, widest: usize, shape: &Shape, device: &Device) -> Result<Tensor> {
        let mut rng = random::stream(self.projection_prng_key, name);
        let sign = match (self.very_sparse, self.sparse) {
            (true, _) => 1.0 / (widest as f64).sqrt(),
            (false, true) => 1.0 / 6.0,
            (false, false) => return random::uniform(&mut rng, 3f64.sqrt(), shape.clone(), device),
        };
        let unit = (1.0 / (2.0 * sign).sqrt()) as f32;
        let mut entry = || match rng.random::<f64>() {
            p if p < sign => -unit,
            p if p < 2.0 * sign => unit,
            _ => 0.0,
        };
        let values: Vec<f32> = (0..shape.elem_count()).map(|_| entry()).collect();
        Ok(Tensor::from_vec(values, shape.clone(), device)?)
    }
}

impl Method for RandLora {
    type Layer = RandLoraLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<RandLoraLayer> {
        site.refuse_lookup("randlora")?;
        let r = site.checked_rank()?;
        if r != self.r {
            return Err(Error::config("rank_pattern", "all layers share one bank, so they have one rank"));
        }
        let dropout = checked_dropout(self.dropout)?;
        let (long, short) = (site.d_in.max(site.d_out), site.d_in.min(site.d_out));
        let (longest, shortest) = (init.widest.0.max(init.widest.1), init.widest.0.min(init.widest.1));
        let count = short.div_ceil(r);
        let all = shortest.div_ceil(r);
        // A bank that PEFT drew cannot be drawn again here.
        let kind = if self.save_projection || self.peft { Shared::Saved } else { Shared::Remade };
        let draw = |name: &'static str| {
            move |_: &mut _, shape: &Shape, device: &Device| self.draw(name, longest, shape, device)
        };
        let a = init.shared("randlora_A", (r, 1, shortest), kind, draw("randlora_A"))?;
        let b = init.shared("randlora_B", (longest, all, r), kind, draw("randlora_B"))?;
        let lambda = init.zeros("randlora_lambda", (r, count))?;
        let gamma = init.constant("randlora_gamma", (count, short), 1.0 / count.max(short) as f64)?;
        let scale = site.alpha / r as f64;
        Ok(RandLoraLayer {
            path: site.path.clone(),
            a: a.narrow(2, 0, short)?,
            b: b.narrow(0, 0, long)?.narrow(1, 0, count)?,
            lambda,
            gamma,
            wide: site.d_in > site.d_out,
            peft: self.peft,
            scale: if self.peft { scale } else { scale / (count as f64).sqrt() },
            dropout,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 4, alpha: 8.0, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("seed alone".to_owned(), Self { save_projection: false, projection_prng_key: 7, ..small.clone() }),
            ("as PEFT".to_owned(), Self { peft: true, ..small.clone() }),
            ("sparse".to_owned(), Self { r: 3, sparse: true, ..small.clone() }),
            ("very sparse".to_owned(), Self { r: 1, very_sparse: true, ..small.clone() }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small }),
        ]
    }

    fn to_peft(&self) -> Option<Map<String, Value>> {
        let mut keys = self.peft.then(|| peft_config::settings_to_keys(self, &NAMES)).flatten()?;
        keys.remove("peft");
        Some(keys)
    }

    fn from_peft(keys: &mut Map<String, Value>) -> Result<Option<Self>> {
        let read = peft_config::settings_from_keys::<Self>(keys, &NAMES)?;
        Ok(read.map(|read| Self { peft: true, ..read }))
    }
}

/// The factors at one site, and its part of the bank.
#[derive(Debug)]
pub struct RandLoraLayer {
    path: String,
    /// [r, 1, d].
    a: Tensor,
    /// [D, N, r].
    b: Tensor,
    lambda: Tensor,
    gamma: Tensor,
    /// Whether the input is the longer side.
    wide: bool,
    peft: bool,
    scale: f64,
    dropout: f64,
}

impl Adapter for RandLoraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view()?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("randlora_lambda", &self.lambda, true);
        map.push("randlora_gamma", &self.gamma, true);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view().map(Some)
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

impl RandLoraLayer {
    /// The sum as one product of rank N r: the trained factors act on A, on the shorter side.
    fn view(&self) -> Result<LowRankView> {
        let (long, count, r) = self.b.dims3()?;
        let short = self.a.dim(2)?;
        let scaled = self.a.broadcast_mul(&self.lambda.unsqueeze(2)?)?.broadcast_mul(&self.gamma.unsqueeze(0)?)?;
        // Rows (k, j) become (j, k), as the columns of B lie; PEFT leaves them.
        let scaled = if self.peft { scaled } else { scaled.transpose(0, 1)?.contiguous()? };
        let scaled = scaled.reshape((count * r, short))?;
        let bank = self.b.reshape((long, count * r))?;
        Ok(if self.wide {
            LowRankView::new(&bank.t()?.contiguous()?, &scaled.t()?.contiguous()?, self.scale)
        } else {
            LowRankView::new(&scaled, &bank, self.scale)
        })
    }
}
