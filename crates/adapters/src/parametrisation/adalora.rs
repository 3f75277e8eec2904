//! AdaLoRA: a product in the form of a singular value decomposition, whose singular values are pruned while it is trained.
//!
//! Equation: y = W x + s P (λ * (Q x)), s = alpha / r; penalty: the mean of |P^T P - I| and |Q Q^T - I| over all layers
//! Shapes:   x [.., d_in] -> y [.., d_out]; Q [r, d_in], λ [r, 1], P [d_out, r] trained; r is the rank at the start, of which a
//!           pruned layer keeps a part
//! Source:   arXiv 2303.10512 eq. 3 to 4 (penalty); the scale is PEFT's, which divides by r + 1e-5
//! Cost:     2 r (d_in + d_out) FLOPs a token forward, twice that backward; r (d_in + d_out + 1) parameters a layer

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Shape, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Init, Method, Site, checked_dropout};
use crate::auxiliary::Auxiliary;
use crate::formats::peft_config::{self, PeftNames};
use crate::low_rank::LowRankView;
use crate::parameter::Role;
use crate::random::normal;
use crate::target::near_misses;
use crate::{Error, Flow, ParameterMap, Result};

/// How AdaLoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaLora {
    /// Rank r of every layer at the start.
    pub r: usize,
    /// Mean rank of a layer in the end.
    pub target_r: usize,
    /// Numerator of the scaling; r itself where it is 0.
    pub alpha: f64,
    /// Probability of dropping an input of Q while training.
    pub dropout: f64,
    /// Steps before the first pruning.
    pub tinit: usize,
    /// Steps after the last pruning.
    pub tfinal: usize,
    /// Steps from one pruning to the next.
    pub delta_t: usize,
    /// Decay of the smoothed sensitivity.
    pub sensitivity_beta: f64,
    /// Decay of its uncertainty.
    pub uncertainty_beta: f64,
    /// Weight of the penalty that keeps P and Q orthogonal.
    pub orth_reg_weight: f64,
    /// Steps of the whole schedule; 0: those of the run.
    pub total_step: usize,
    /// Which of the r triplets each layer has kept, by module path; all where it is not named.
    pub kept: BTreeMap<String, Vec<bool>>,
}

impl Default for AdaLora {
    fn default() -> Self {
        Self {
            r: 12,
            target_r: 8,
            alpha: 8.0,
            dropout: 0.0,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            sensitivity_beta: 0.85,
            uncertainty_beta: 0.85,
            orth_reg_weight: 0.5,
            total_step: 0,
            kept: BTreeMap::new(),
        }
    }
}

/// PEFT's key of the kept triplets, and how it names a layer there.
const PATTERN: (&str, &str) = ("rank_pattern", ".lora_E");

impl AdaLora {
    /// Whether the settings can be meant.
    fn check(&self) -> Result<()> {
        checked_dropout(self.dropout)?;
        for (key, beta) in [("sensitivity_beta", self.sensitivity_beta), ("uncertainty_beta", self.uncertainty_beta)] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(Error::config(key, format!("{beta} is not between 0 and 1")));
            }
        }
        if self.delta_t == 0 {
            return Err(Error::config("delta_t", "0 steps from one pruning to the next, expected at least 1"));
        }
        if !(self.orth_reg_weight >= 0.0 && self.orth_reg_weight.is_finite()) {
            return Err(Error::config("orth_reg_weight", format!("{} is not a weight", self.orth_reg_weight)));
        }
        if self.total_step > 0 && self.tinit + self.tfinal >= self.total_step {
            return Err(Error::config(
                "total_step",
                format!("{} steps leave none between tinit {} and tfinal {}", self.total_step, self.tinit, self.tfinal),
            ));
        }
        Ok(())
    }

    /// The rank that the layer at `path` has kept.
    fn rank(&self, path: &str) -> Result<usize> {
        let Some(kept) = self.kept.get(path) else { return Ok(self.r) };
        if kept.len() != self.r {
            let said = format!("{path}: {} triplets are listed, rank r is {}", kept.len(), self.r);
            return Err(Error::config(PATTERN.0, said));
        }
        Ok(kept.iter().filter(|kept| **kept).count())
    }
}

impl Method for AdaLora {
    type Layer = AdaLoraLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames {
        kind: "ADALORA",
        keys: &[("r", "init_r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("delta_t", "deltaT"), ("sensitivity_beta", "beta1"), ("uncertainty_beta", "beta2")],
        fixed: &[("init_lora_weights", "true"), ("use_dora", "false"), ("use_rslora", "false")],
    });
    const TENSORS: &'static [&'static str] = &["lora_A", "lora_B", "lora_E"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<AdaLoraLayer> {
        site.refuse_lookup("adalora")?;
        self.check()?;
        if site.checked_rank()? != self.r {
            let said = format!("{}: rank {}; adalora starts every module at r = {}", site.path, site.rank, self.r);
            return Err(Error::config(PATTERN.0, said));
        }
        let rank = self.rank(&site.path)?;
        let drawn = |rng: &mut ChaCha8Rng, shape: &Shape, device: &Device| normal(rng, 0.02, shape.dims(), device);
        let start = self.r as f64;
        let alpha = if self.alpha > 0.0 { self.alpha } else { start };
        Ok(AdaLoraLayer {
            path: site.path.clone(),
            q: init.trainable("lora_A", (rank, site.d_in), drawn)?,
            p: init.trainable("lora_B", (site.d_out, rank), drawn)?,
            values: init.zeros("lora_E", (rank, 1))?,
            scale: alpha / (start + 1e-5),
            dropout: self.dropout,
            weight: self.orth_reg_weight,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, 0.0)
    }

    fn check_schedule(&self, steps: usize) -> Result<()> {
        if self.tinit >= steps {
            return Ok(());
        }
        Err(Error::unsupported(
            format!("adalora in a run of {steps} steps with tinit {}", self.tinit),
            "training does not prune yet, so it ends at tinit: set tinit to the run's steps or more, and all ranks are kept",
        ))
    }

    fn check_sites(&self, paths: &[&str]) -> Result<()> {
        match self.kept.keys().find(|path| !paths.contains(&path.as_str())) {
            None => Ok(()),
            Some(path) => {
                let near_misses = near_misses(path, paths.iter().map(|p| (*p).to_owned()));
                Err(Error::NoTarget { key: PATTERN.0, pattern: path.clone(), near_misses })
            }
        }
    }

    fn examples() -> Vec<(String, Self)> {
        // Whatever the length of a run, it does not come to pruning.
        let unpruned = Self { tinit: 1 << 20, ..Self::default() };
        let small = Self { r: 3, target_r: 2, ..unpruned.clone() };
        vec![
            ("unpruned".to_owned(), unpruned),
            ("scale of one".to_owned(), Self { alpha: 0.0, orth_reg_weight: 0.0, ..small.clone() }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small }),
        ]
    }

    fn to_peft(&self) -> Option<Map<String, Value>> {
        let names = Self::PEFT?;
        // PEFT reads no file without the steps of the schedule.
        let total_step = if self.total_step > 0 { self.total_step } else { self.tinit + self.tfinal + 1 };
        let mut keys = peft_config::settings_to_keys(&Self { total_step, kept: BTreeMap::new(), ..self.clone() }, &names)?;
        keys.remove("kept");
        let pattern = self.kept.iter().map(|(path, kept)| (format!("{path}{}", PATTERN.1), kept.clone().into()));
        let pattern: Map<String, Value> = pattern.collect();
        keys.insert(PATTERN.0.into(), if pattern.is_empty() { Value::Null } else { Value::Object(pattern) });
        Some(keys)
    }

    fn from_peft(keys: &mut Map<String, Value>) -> Result<Option<Self>> {
        let Some(names) = Self::PEFT.filter(|names| keys.get("peft_type").is_some_and(|kind| kind == names.kind)) else {
            return Ok(None);
        };
        // LoRA's own rank, which PEFT keeps in the file and ignores.
        if let Some(other) = keys.remove("r").filter(|r| !r.is_null() && r.as_u64().is_none()) {
            return Err(Error::config("r", format!("{other} is not valid for {}", names.kind)));
        }
        let pattern = keys.remove(PATTERN.0).filter(|pattern| !pattern.is_null());
        let Some(mut method) = peft_config::settings_from_keys::<Self>(keys, &names)? else { return Ok(None) };
        if let Some(pattern) = pattern {
            let wrong = |e: serde_json::Error| Error::config(PATTERN.0, format!("not lists of kept triplets: {e}"));
            let pattern: BTreeMap<String, Vec<bool>> = serde_json::from_value(pattern).map_err(wrong)?;
            for (name, kept) in pattern {
                let Some(path) = name.strip_suffix(PATTERN.1) else {
                    return Err(Error::config(PATTERN.0, format!("`{name}` does not end in `{}`", PATTERN.1)));
                };
                method.kept.insert(path.to_owned(), kept);
            }
        }
        Ok(Some(method))
    }
}

/// P, λ and Q at one site.
#[derive(Debug)]
pub struct AdaLoraLayer {
    path: String,
    q: Tensor,
    p: Tensor,
    values: Tensor,
    scale: f64,
    dropout: f64,
    weight: f64,
}

impl AdaLoraLayer {
    fn view(&self) -> Result<LowRankView> {
        let rank = self.q.dim(0)?;
        if rank == 0 {
            // Nothing was kept: a product of zeros, which every fused form takes.
            let zeros = |shape| Tensor::zeros(shape, self.q.dtype(), self.q.device());
            return Ok(LowRankView::new(&zeros((1, self.q.dim(1)?))?, &zeros((self.p.dim(0)?, 1))?, 1.0));
        }
        Ok(LowRankView::new(&self.q, &self.p, self.scale).rank_scale(&self.values.reshape(rank)?))
    }
}

/// |M - I|, M square: 0 with a gradient of 0 where M is the identity.
fn distance_to_identity(square: &Tensor) -> Result<Tensor> {
    let identity = Tensor::eye(square.dim(0)?, square.dtype(), square.device())?;
    Ok(((square - identity)?.sqr()?.sum_all()? + 1e-24)?.sqrt()?)
}

impl Adapter for AdaLoraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view()?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        let trained = self.q.elem_count() > 0;
        map.push_as("lora_A", &self.q, trained, Role::Down);
        map.push_as("lora_B", &self.p, trained, Role::Up);
        map.push("lora_E", &self.values, trained);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view().map(Some)
    }

    fn penalty(&self) -> Result<Option<Auxiliary>> {
        if self.weight == 0.0 || self.q.elem_count() == 0 {
            return Ok(None);
        }
        let rows = distance_to_identity(&self.q.matmul(&self.q.t()?)?)?;
        let columns = distance_to_identity(&self.p.t()?.matmul(&self.p)?)?;
        Ok(Some(Auxiliary { name: "orthogonality", weight: self.weight, sum: (rows + columns)?, count: 2 }))
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
