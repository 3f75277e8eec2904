//! ReLoRA: every so many steps the product is added to the frozen weight and begins anew, so that the sum has a higher rank.
//!
//! Equation: after every `every` steps W <- W + s B A; A <- drawn anew, B <- 0; the `prune` share of the optimiser's moments of A
//!           and B that is smallest <- 0; lr <- lr * k / `rewarm` in the k-th step after it, k < `rewarm`
//! Shapes:   W [d_out, d_in] in f32; A [r, d_in], B [d_out, r]
//! Source:   arXiv 2307.05695 algorithm 1 and section 3 (99 % of the moments pruned by size); here an entry loses all its moments or
//!           none, for one with a first moment alone would move by it over epsilon while B is 0 and A has no gradient; with
//!           `prune = 1` the counts of updates begin anew as well
//! Cost:     2 r d_in d_out FLOPs a site and restart; what comes out is a model, not an adapter

use std::collections::BTreeMap;

use candle_core::Tensor;
use espalier_adapters::random::{stream, uniform};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Dynamics, Example, Fit, Moving, Settings, checked_count, checked_share};
use crate::moved_base::MovedBase;
use crate::pairs::{Side, pairs};
use crate::{Error, Result};

/// How ReLoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Relora {
    /// Steps between restarts.
    pub every: usize,
    /// Steps over which the learning rate rises again after one.
    pub rewarm: usize,
    /// Share of the optimiser's moments that a restart sets to 0, the smallest first.
    pub prune: f64,
}

impl Default for Relora {
    fn default() -> Self {
        Self { every: 1000, rewarm: 100, prune: 0.99 }
    }
}

impl Settings for Relora {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        checked_count("every", self.every)?;
        checked_share("prune", self.prune)?;
        if self.rewarm >= self.every {
            let message = format!("{} steps are no fewer than the {} between restarts", self.rewarm, self.every);
            return Err(Error::recipe("dynamics.rewarm", message));
        }
        let pairs = pairs("relora", fit.model, fit.attached)?;
        let base = MovedBase::of("relora", &pairs)?;
        let sites = pairs.into_iter().map(|p| Site { path: p.path, down: p.down, up: p.up, scale: p.scale }).collect();
        Ok(State { settings: self.clone(), sites, base, step: 0 })
    }

    fn examples() -> Vec<Example<Self>> {
        let adapter = "method = 'lora'\nr = 3\ndropout = 0.1";
        vec![
            Example { name: "as it comes", settings: Self::default(), adapter },
            Example { name: "three steps", settings: Self { every: 3, rewarm: 2, prune: 0.9 }, adapter },
            Example { name: "two steps, all forgotten", settings: Self { every: 2, rewarm: 0, prune: 1.0 }, adapter },
        ]
    }
}

/// One product.
#[derive(Debug)]
struct Site {
    path: String,
    down: Side,
    up: Side,
    scale: f64,
}

/// The products of a run and the weights that they were added to.
#[derive(Debug)]
pub struct State {
    settings: Relora,
    sites: Vec<Site>,
    base: MovedBase,
    /// Steps taken.
    step: usize,
}

impl Dynamics for State {
    fn rate(&self, step: usize) -> f64 {
        let since = step % self.settings.every;
        match step >= self.settings.every && since < self.settings.rewarm {
            true => since as f64 / self.settings.rewarm as f64,
            false => 1.0,
        }
    }

    fn enter(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        self.step = moving.step;
        Ok(())
    }

    fn still(&self, index: usize) -> Option<String> {
        let ours = self.sites.iter().any(|s| s.down.index == Some(index) || s.up.index == Some(index));
        // The first step after a restart has a learning rate of 0 where it rises again.
        let unmoved = self.step % self.settings.every < 1 + usize::from(self.settings.rewarm > 0);
        (ours && unmoved && self.step >= self.settings.every)
            .then(|| "its product has just become a part of the frozen weight".to_owned())
    }

    fn after(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        self.step = moving.step;
        // After the last step there is nothing to begin anew for.
        if !moving.step.is_multiple_of(self.settings.every) || moving.step >= moving.total {
            return Ok(());
        }
        for site in &self.sites {
            let (a, b) = (site.down.tensor.detach(), site.up.tensor.detach());
            self.base.add(&site.path, &(b.matmul(&a)? * site.scale)?)?;
            let mut rng = stream(moving.seed, &format!("relora {} {}", moving.step, site.path));
            let drawn = uniform(&mut rng, 1.0 / (a.dim(1)? as f64).sqrt(), a.shape(), a.device())?;
            for (side, values) in [(&site.down, drawn.to_dtype(a.dtype())?), (&site.up, b.zeros_like()?)] {
                candle_core::Var::from_tensor(&side.tensor)?.set(&values)?;
                moving.optimizer.prune(&side.name, self.settings.prune)?;
            }
        }
        self.base.put(moving.model, |_| true)
    }

    fn metrics(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("restarts".into(), (self.step / self.settings.every).into());
        map
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(self.base.state().collect())
    }

    fn restore(&mut self, mut state: BTreeMap<String, Tensor>, moving: &mut Moving<'_>) -> Result<()> {
        self.base.restore(&mut state, moving.model)?;
        match state.into_keys().next() {
            Some(name) => Err(Error::run(name, "belongs to no product of this run")),
            None => Ok(()),
        }
    }

    fn moves_base(&self) -> bool {
        true
    }

    fn bytes(&self, plain: u64) -> u64 {
        // While a weight is rewritten, the old one is still there.
        plain + self.base.bytes()
    }
}
