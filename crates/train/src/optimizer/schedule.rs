//! Courses of the learning rate.
//!
//! Equation: lr(k) = lr * warm(k) * fall(k) for step k from 0, as transformers' schedulers; wsd holds, then falls
//! Shapes:   scalars
//! Source:   transformers `optimization.py`; wsd arXiv 2404.06395 section 4
//! Cost:     none

use crate::recipe::Recipe;

/// A course over a known number of steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    kind: Kind,
    warmup: usize,
    total: usize,
    floor: f64,
    decay: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Constant,
    Linear,
    Cosine,
    WarmupStableDecay,
}

impl Schedule {
    /// The recipe's course over `total` steps.
    pub fn new(recipe: &Recipe, total: usize) -> Self {
        let kind = match recipe.schedule.as_str() {
            "constant" => Kind::Constant,
            "cosine" => Kind::Cosine,
            "wsd" => Kind::WarmupStableDecay,
            _ => Kind::Linear,
        };
        let warmup =
            recipe.warmup_steps.unwrap_or_else(|| (recipe.warmup_ratio * total as f64).ceil() as usize).min(total);
        let decay = (recipe.decay_ratio * total as f64).ceil() as usize;
        Self { kind, warmup, total, floor: recipe.min_lr_ratio, decay }
    }

    /// Factor on the learning rate at `step`, from 0.
    pub fn factor(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup.max(1) as f64;
        }
        let span = self.total.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / span).min(1.0);
        let fall = match self.kind {
            Kind::Constant => return 1.0,
            Kind::Linear => 1.0 - progress,
            Kind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Kind::WarmupStableDecay => {
                let left = self.total.saturating_sub(step);
                (left as f64 / self.decay.max(1) as f64).min(1.0)
            }
        };
        self.floor + (1.0 - self.floor) * fall
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn course(kind: &str, warmup: usize, total: usize) -> Schedule {
        let recipe = Recipe { schedule: kind.into(), warmup_steps: Some(warmup), ..Recipe::default() };
        Schedule::new(&recipe, total)
    }

    #[test]
    fn follows_the_reference_formulas() {
        let linear = course("linear", 2, 10);
        assert_eq!((linear.factor(0), linear.factor(1), linear.factor(2)), (0.0, 0.5, 1.0));
        assert!((linear.factor(6) - 0.5).abs() < 1e-12);
        let cosine = course("cosine", 0, 8);
        assert!((cosine.factor(4) - 0.5).abs() < 1e-12);
        assert!(cosine.factor(8).abs() < 1e-12);
        assert_eq!(course("constant", 0, 5).factor(4), 1.0);
        let wsd = course("wsd", 0, 100);
        assert_eq!((wsd.factor(50), wsd.factor(95)), (1.0, 0.5));
    }
}
