//! LoRA-XS and LoRA-SB: a small trained matrix between two frozen factors, from the base or from the first step of full tuning.
//!
//! Equation: y = W x + s B R A x; start `svd`: W = U S V^T, B = U_r S_r, A = V_r^T, R ~ N(0, 1e-10) (LoRA-XS);
//!           start `gradient`: -lr sign(G) = U S V^T, B = U_r, A = V_r^T, R = S_r / s, and nothing is taken from W (LoRA-SB)
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [r, d_in], B [d_out, r] frozen, R [r, r] trained; G [d_out, d_in]
//! Source:   LoRA-XS arXiv 2405.17604 eq. 2; LoRA-SB arXiv 2411.19557 section 3 and its code
//! Cost:     2 r (d_in + d_out + r) FLOPs a token forward, twice that backward; r^2 parameters a layer; one SVD a layer at the start

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Evidence, EvidenceKind, Init, Method, Site, Wanted, checked_dropout};
use crate::low_rank::LowRankView;
use crate::{Error, Flow, ParameterMap, Result, decomposition, random};

/// What the frozen factors are taken from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The singular vectors of the base (LoRA-XS).
    #[default]
    Svd,
    /// Those of an estimate of the first step of full fine-tuning (LoRA-SB).
    Gradient,
}

/// What the estimate of the first step is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// The sign of the gradient, as AdamW's first step.
    #[default]
    Sign,
    /// The gradient itself (an ablation).
    Raw,
}

/// How LoRA-XS is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraXs {
    /// Rank r.
    pub r: usize,
    /// Numerator of the scaling alpha / r.
    pub alpha: f64,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
    /// What the frozen factors are taken from.
    pub start: Origin,
    /// What the estimate of the first step is, where they are taken from that.
    pub update: Update,
    /// Learning rate of the estimated step; 0: that of the run's first.
    pub start_lr: f64,
    /// Whether R starts at the estimated step; else at zero (an ablation).
    pub keep_first_step: bool,
    /// Rows of the training data that the gradient is taken over.
    pub rows: usize,
}

impl Default for LoraXs {
    fn default() -> Self {
        Self {
            r: 16,
            alpha: 16.0,
            dropout: 0.0,
            start: Origin::Svd,
            update: Update::Sign,
            start_lr: 0.0,
            keep_first_step: true,
            rows: 64,
        }
    }
}

/// Side of a matrix above which its leading singular vectors are found by iteration.
const EXACT: usize = 1024;
/// Iterations then.
const ITERATIONS: usize = 16;
/// Names of A, B and R in files: A and B as LoRA's.
const NAMES: [&str; 3] = ["lora_A.weight", "lora_B.weight", "lora_latent_mapping.weight"];

/// The leading `r` singular triplets of `matrix`: U [m, r], S, V^T [r, n].
fn leading(matrix: &Tensor, r: usize, seed: u64, path: &str) -> Result<(Tensor, Tensor, Tensor)> {
    let (m, n) = matrix.dims2()?;
    let (u, s, vt) = if m.min(n) > EXACT && 4 * r < m.min(n) {
        decomposition::randomised_svd(matrix, r, ITERATIONS, &mut random::stream(seed, &format!("{path}.lora_xs")))?
    } else {
        decomposition::svd(matrix)?
    };
    let s: Vec<f32> = s[..r].iter().map(|s| *s as f32).collect();
    Ok((
        u.narrow(1, 0, r)?.contiguous()?,
        Tensor::new(s, matrix.device())?,
        vt.narrow(0, 0, r)?.contiguous()?,
    ))
}

impl LoraXs {
    fn scale(&self, site: &Site) -> f64 {
        site.alpha / site.rank as f64
    }

    /// The rank, which the weight must have.
    fn checked_rank(site: &Site) -> Result<usize> {
        let (r, least) = (site.checked_rank()?, site.d_in.min(site.d_out));
        if r > least {
            return Err(Error::config("r", format!("{}: rank {r} exceeds the rank {least} of its weight", site.path)));
        }
        Ok(r)
    }

    fn from_base(site: &Site, r: usize) -> Result<[Tensor; 2]> {
        let (u, s, vt) = leading(&site.base.dequantize(DType::F32)?, r, 0, &site.path)?;
        Ok([vt, u.broadcast_mul(&s)?])
    }
}

impl Method for LoraXs {
    type Layer = LoraXsLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<LoraXsLayer> {
        site.refuse_lookup("lora-xs")?;
        let r = Self::checked_rank(site)?;
        let dropout = checked_dropout(self.dropout)?;
        let [name_a, name_b, name_r] = NAMES;
        if init.is_fresh() && self.start == Origin::Gradient && !init.has_start(name_r) {
            return Err(Error::unsupported(
                format!("lora-xs from the gradient of {}", site.path),
                "it starts from data, so it needs a training run; adapters are not made without one",
            ));
        }
        let factors = match init.is_fresh() && self.start == Origin::Svd {
            true => Self::from_base(site, r)?.map(Some),
            false => [None, None],
        };
        let [of_a, of_b] = factors;
        let given = |tensor: Option<Tensor>| tensor.ok_or_else(|| Error::unsupported("lora-xs", "no start was made"));
        Ok(LoraXsLayer {
            path: site.path.clone(),
            a: init.frozen(name_a, (r, site.d_in), |_, _, _| given(of_a))?,
            b: init.frozen(name_b, (site.d_out, r), |_, _, _| given(of_b))?,
            r: init.trainable(name_r, (r, r), |rng, shape, device| random::normal(rng, 1e-5, shape, device))?,
            scale: self.scale(site),
            dropout,
        })
    }

    fn wanted(&self) -> Option<Wanted> {
        (self.start == Origin::Gradient).then_some(Wanted { kind: EvidenceKind::Gradient, rows: self.rows })
    }

    fn starts(&self, site: &Site, evidence: &Evidence<'_>) -> Result<Vec<(String, Tensor)>> {
        let r = Self::checked_rank(site)?;
        let gradient = evidence.values;
        let step = match self.update {
            Update::Sign => gradient.sign()?,
            Update::Raw => gradient.clone(),
        };
        let lr = if self.start_lr > 0.0 { self.start_lr } else { evidence.first_lr };
        let (u, s, vt) = leading(&(step * -lr)?, r, evidence.seed, &site.path)?;
        let core = if s.to_vec1::<f32>()?[0] == 0.0 || !self.keep_first_step {
            Tensor::zeros((r, r), DType::F32, gradient.device())?
        } else {
            Tensor::eye(r, DType::F32, gradient.device())?.broadcast_mul(&(s.clone() / self.scale(site))?)?
        };
        let [a, b] = match s.to_vec1::<f32>()?[0] == 0.0 {
            // Nothing is known of a layer that the loss does not depend on.
            true => Self::from_base(site, r)?,
            false => [vt, u],
        };
        Ok(NAMES.iter().map(|name| (*name).to_owned()).zip([a, b, core]).collect())
    }

    fn starts_at_base(&self) -> bool {
        self.start == Origin::Gradient && !self.keep_first_step
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 3, alpha: 6.0, ..Self::default() };
        vec![
            ("of the base".to_owned(), small.clone()),
            ("of the gradient".to_owned(), Self { start: Origin::Gradient, start_lr: 0.05, ..small.clone() }),
            ("of the raw gradient".to_owned(), Self {
                start: Origin::Gradient,
                update: Update::Raw,
                keep_first_step: false,
                ..small.clone()
            }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small }),
        ]
    }
}

/// A, B and R at one site.
#[derive(Debug)]
pub struct LoraXsLayer {
    path: String,
    a: Tensor,
    b: Tensor,
    r: Tensor,
    scale: f64,
    dropout: f64,
}

impl Adapter for LoraXsLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view()?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let [name_a, name_b, name_r] = NAMES;
        let mut map = ParameterMap::new();
        map.push(name_a, &self.a, false);
        map.push(name_b, &self.b, false);
        map.push(name_r, &self.r, true);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view().map(Some)
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

impl LoraXsLayer {
    fn view(&self) -> Result<LowRankView> {
        Ok(LowRankView::new(&self.r.matmul(&self.a)?, &self.b, self.scale))
    }
}
