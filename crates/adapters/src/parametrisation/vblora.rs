//! VB-LoRA: both low-rank factors are put together from vectors of one bank that all layers share.
//!
//! Equation: y = W x + B A x; each run of b values of a row of A (and of a column of B) is sum_j w_j v_j over the `topk` vectors
//!           with the largest logits, w the softmax of those logits
//! Shapes:   x [.., d_in] -> y [.., d_out]; bank [h, b] and logits [r, d_in / b, h], [d_out / b, r, h] trained; A [r, d_in],
//!           B [d_out, r]
//! Source:   arXiv 2405.15179 eq. 2 and 3; bank uniform in +- `init_vector_bank_bound`, logits normal: the start is not the base
//! Cost:     LoRA's a token, and 2 topk r (d_in + d_out) FLOPs a pass; h r (d_in + d_out) / b parameters a layer, h b in all

use std::sync::Arc;

use candle_core::{D, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Shared, Site, checked_dropout};
use crate::formats::peft_config::PeftNames;
use crate::low_rank::LowRankView;
use crate::{Error, Flow, ParameterMap, Result, random};

/// How VB-LoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vblora {
    /// Rank r.
    pub r: usize,
    /// Vectors h of the bank.
    pub num_vectors: usize,
    /// Length b of a vector; divides every width.
    pub vector_length: usize,
    /// Vectors that make up one run.
    pub topk: usize,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
    /// Bound of the bank's first values.
    pub init_vector_bank_bound: f64,
    /// Standard deviation of the first logits.
    pub init_logits_std: f64,
}

impl Default for Vblora {
    fn default() -> Self {
        Self {
            r: 4,
            num_vectors: 256,
            vector_length: 256,
            topk: 2,
            dropout: 0.0,
            init_vector_bank_bound: 0.02,
            init_logits_std: 0.1,
        }
    }
}

impl Vblora {
    /// How many vectors make up `width` values.
    fn runs(&self, site: &Site, width: usize) -> Result<usize> {
        if self.vector_length == 0 || !width.is_multiple_of(self.vector_length) {
            let message = format!("{}: {} does not divide the width {width}", site.path, self.vector_length);
            return Err(Error::config("vector_length", message));
        }
        Ok(width / self.vector_length)
    }
}

impl Method for Vblora {
    type Layer = VbloraLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames {
        kind: "VBLORA",
        keys: &[("dropout", "vblora_dropout")],
        fixed: &[("save_only_topk_weights", "false")],
    });
    const TENSORS: &'static [&'static str] = &["vblora_logits_A", "vblora_logits_B"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<VbloraLayer> {
        site.refuse_lookup("vblora")?;
        let (r, h) = (site.checked_rank()?, self.num_vectors);
        let (read, written) = (self.runs(site, site.d_in)?, self.runs(site, site.d_out)?);
        if self.topk == 0 || self.topk > h {
            return Err(Error::config("topk", format!("{} of a bank of {h} vectors", self.topk)));
        }
        let (bound, std) = (self.init_vector_bank_bound, self.init_logits_std);
        let bank =
            init.shared("vblora_vector_bank", (h, self.vector_length), Shared::Trained, |rng, shape, device| {
                random::uniform(rng, bound, shape, device)
            })?;
        let mut logits = |name: &str, shape: (usize, usize, usize)| {
            init.trainable(name, shape, |rng, shape, device| random::normal(rng, std, shape, device))
        };
        Ok(VbloraLayer {
            path: site.path.clone(),
            logits_a: logits("vblora_logits_A", (r, read, h))?,
            logits_b: logits("vblora_logits_B", (written, r, h))?,
            bank,
            topk: self.topk,
            dropout: checked_dropout(self.dropout)?,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, 0.0)
    }

    fn examples() -> Vec<(String, Self)> {
        let bank = Self { num_vectors: 6, vector_length: 1, init_vector_bank_bound: 0.3, ..Self::default() };
        vec![
            ("two vectors".to_owned(), bank.clone()),
            ("three vectors, dropout".to_owned(), Self { topk: 3, dropout: 0.4, ..bank }),
        ]
    }

    fn starts_at_base(&self) -> bool {
        false
    }
}

/// The logits at one site, and the bank.
#[derive(Debug)]
pub struct VbloraLayer {
    path: String,
    logits_a: Tensor,
    logits_b: Tensor,
    bank: Tensor,
    topk: usize,
    dropout: f64,
}

impl VbloraLayer {
    /// The runs [i, j, b] that `logits` [i, j, h] choose.
    fn runs(&self, logits: &Tensor) -> Result<Tensor> {
        let (i, j, h) = logits.dims3()?;
        let (rows, k, b) = (i * j, self.topk, self.bank.dim(1)?);
        let logits = logits.reshape((rows, h))?;
        let places = logits.detach().arg_sort_last_dim(false)?.narrow(1, 0, k)?.contiguous()?;
        let chosen = logits.gather(&places, 1)?;
        let weights = chosen.broadcast_sub(&chosen.detach().narrow(1, 0, 1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
        let vectors = self.bank.index_select(&places.flatten_all()?, 0)?.reshape((rows, k, b))?;
        Ok(vectors.broadcast_mul(&weights.unsqueeze(D::Minus1)?)?.sum(1)?.reshape((i, j, b))?)
    }

    fn view(&self) -> Result<LowRankView> {
        let a = self.runs(&self.logits_a)?.flatten_from(1)?;
        let b = self.runs(&self.logits_b)?.transpose(1, 2)?.contiguous()?.flatten_to(1)?;
        Ok(LowRankView::new(&a, &b, 1.0))
    }
}

impl Adapter for VbloraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view()?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("vblora_logits_A", &self.logits_a, true);
        map.push("vblora_logits_B", &self.logits_b, true);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view().map(Some)
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
