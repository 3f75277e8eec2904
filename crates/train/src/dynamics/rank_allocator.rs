//! Which ranks of products P diag(λ) Q are kept while a budget shrinks: those that matter most over all layers.
//!
//! Equation: I = |w g|, Ī = β1 Ī + (1 - β1) I, U = β2 U + (1 - β2) |I - Ī|; a triplet's score is s(λ) + the means of s over its row of
//!           Q and its column of P, with s = Ī U; the budget falls from b0 to b1 by b1 + (b0 - b1) (1 - (t - ti) / (T - tf - ti))^3
//! Shapes:   Q [r, d_in], P [d_out, r], λ [r, 1] of each layer; a mask `[r]` for each
//! Source:   arXiv 2303.10512 eq. 8 to 12, algorithm 1; ties and rounding as in PEFT's `RankAllocator`
//! Cost:     a few passes over the adapter's parameters a step, and one sort of all scores at a pruning

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// The course of the budget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Mean rank of a layer in the end.
    pub target: usize,
    /// Steps before the first pruning.
    pub initial: usize,
    /// Steps after the last pruning.
    pub last: usize,
    /// Steps from one pruning to the next.
    pub every: usize,
    /// Steps of the whole.
    pub total: usize,
    /// Decay β1 of the smoothed sensitivity.
    pub beta1: f64,
    /// Decay β2 of its uncertainty.
    pub beta2: f64,
}

/// The three tensors of a layer, or their gradients.
#[derive(Debug, Clone)]
pub struct Triplets {
    /// Q [r, d_in].
    pub q: Tensor,
    /// P [d_out, r].
    pub p: Tensor,
    /// λ [r, 1].
    pub values: Tensor,
}

impl Triplets {
    fn parts(&self) -> [&Tensor; 3] {
        [&self.q, &self.p, &self.values]
    }
}

/// Smoothed sensitivity and its uncertainty, for Q, P and λ.
type Importance = [(Tensor, Tensor); 3];

/// Which triplets of each layer are kept, by layer.
pub type Masks = BTreeMap<String, Vec<bool>>;

/// Follows the importance of all triplets, and says which are kept.
#[derive(Debug)]
pub struct RankAllocator {
    budget: Budget,
    /// Rank at the start, by layer.
    ranks: BTreeMap<String, usize>,
    importance: BTreeMap<String, Importance>,
    masks: Option<Masks>,
}

impl RankAllocator {
    /// For layers of these ranks.
    ///
    /// # Errors
    /// If the course leaves no step to prune in, or a decay is none.
    pub fn new(budget: Budget, ranks: BTreeMap<String, usize>) -> Result<Self> {
        let Budget { initial, last, total, every, .. } = budget;
        if initial + last >= total || every == 0 {
            let message = format!(
                "a budget over {total} steps, {initial} before it and {last} after it, every {every}: no step is left to prune in"
            );
            return Err(Error::recipe("adapter.total_step", message));
        }
        for (key, beta) in [("adapter.sensitivity_beta", budget.beta1), ("adapter.uncertainty_beta", budget.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(Error::recipe(key, format!("{beta} is not between 0 and 1")));
            }
        }
        Ok(Self { budget, ranks, importance: BTreeMap::new(), masks: None })
    }

    /// Triplets that may be kept after `step`, and whether it is one of pruning.
    pub fn at(&self, step: usize) -> (usize, bool) {
        let Budget { target, initial, last, every, total, .. } = self.budget;
        let start: usize = self.ranks.values().sum();
        let end = target * self.ranks.len();
        if step <= initial {
            return (start, false);
        }
        if step > total - last {
            return (end, true);
        }
        let left = 1.0 - (step - initial) as f64 / (total - last - initial) as f64;
        let kept = (start as f64 - end as f64) * left.powi(3) + end as f64;
        (kept as usize, step.is_multiple_of(every))
    }

    /// After `step`: takes note of values and gradients by layer, and gives the masks that hold now, where something is pruned.
    ///
    /// # Errors
    /// If a layer is missing or shapes do not fit.
    pub fn step(&mut self, step: usize, layers: &BTreeMap<String, (Triplets, Triplets)>) -> Result<Option<&Masks>> {
        let end = self.budget.total - self.budget.last;
        if step < end {
            self.observe(layers)?;
        }
        let (budget, due) = self.at(step);
        if step <= end && (due || step == end) {
            self.masks = Some(self.choose(budget)?);
            if step == end {
                self.importance.clear();
            }
            return Ok(self.masks.as_ref());
        }
        // Past the last pruning the masks are held; between prunings what was set to 0 may grow again.
        Ok(self.masks.as_ref().filter(|_| step > end))
    }

    fn observe(&mut self, layers: &BTreeMap<String, (Triplets, Triplets)>) -> Result<()> {
        let Budget { beta1, beta2, .. } = self.budget;
        for name in self.ranks.keys() {
            let Some((values, gradients)) = layers.get(name) else {
                return Err(Error::run(name, "its importance is followed, but it has no gradients"));
            };
            let mut found = Vec::with_capacity(3);
            for (i, (value, gradient)) in values.parts().into_iter().zip(gradients.parts()).enumerate() {
                let own = (value.detach() * gradient.detach())?.abs()?;
                let (smooth, doubt) = match self.importance.get(name) {
                    Some(known) => known[i].clone(),
                    None => (own.zeros_like()?, own.zeros_like()?),
                };
                let smooth = ((smooth * beta1)? + (&own * (1.0 - beta1))?)?;
                let doubt = ((doubt * beta2)? + ((own - &smooth)?.abs()? * (1.0 - beta2))?)?;
                found.push((smooth, doubt));
            }
            if let Ok(found) = Importance::try_from(found) {
                self.importance.insert(name.clone(), found);
            }
        }
        Ok(())
    }

    /// Scores `[r]` of a layer's triplets.
    fn scores(&self, name: &str) -> Result<Vec<f64>> {
        let Some([q, p, values]) = self.importance.get(name) else {
            return Err(Error::run(name, "nothing is known of its importance yet"));
        };
        let score = |(smooth, doubt): &(Tensor, Tensor)| smooth * doubt;
        let vectors = (score(q)?.mean(1)? + score(p)?.mean(0)?)?;
        Ok((score(values)?.flatten_all()? + vectors)?.to_dtype(DType::F64)?.to_vec1()?)
    }

    /// Keeps what scores above the highest of those that must go.
    fn choose(&self, budget: usize) -> Result<Masks> {
        let scores = self.ranks.keys().map(|name| Ok((name, self.scores(name)?))).collect::<Result<Vec<_>>>()?;
        let mut all: Vec<f64> = scores.iter().flat_map(|(_, own)| own.iter().copied()).collect();
        all.sort_by(f64::total_cmp);
        let threshold = all.len().checked_sub(budget).and_then(|gone| gone.checked_sub(1)).map(|at| all[at]);
        let kept = |score: &f64| threshold.is_none_or(|threshold| *score > threshold);
        Ok(scores.into_iter().map(|(name, own)| (name.clone(), own.iter().map(kept).collect())).collect())
    }
}
