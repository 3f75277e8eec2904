//! Lion: the sign of an interpolated momentum.
//!
//! Equation: c = b1 m + (1 - b1) g; p <- p (1 - lr wd) - lr sign(c); m <- b2 m + (1 - b2) g
//! Shapes:   p, g, m of one shape
//! Source:   arXiv 2302.06675 algorithm 2 (b1 0.9, b2 0.99; learning rates 3 to 10 times below AdamW's)
//! Cost:     8 FLOPs and 20 bytes a parameter and step; half of AdamW's moments

use candle_core::{DType, Tensor};

use super::{Rule, Work};
use crate::Result;
use crate::recipe::Recipe;

/// The rule's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// Share of the momentum in the direction.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
}

impl Lion {
    /// The recipe's settings.
    ///
    /// # Errors
    /// Never; other rules check theirs.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        Ok(Self { beta1: recipe.beta1, beta2: recipe.beta2 })
    }
}

impl Rule for Lion {
    fn slots(&self, _: &[usize]) -> &'static [&'static str] {
        &["m"]
    }

    fn update(&self, work: &Work<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        let m = &work.slots[0];
        let g = (work.gradient * work.at.scale)?;
        let direction = ((m * self.beta1)? + (&g * (1.0 - self.beta1))?)?.sign()?;
        let m = ((m * self.beta2)? + (g * (1.0 - self.beta2))?)?;
        let kept = (work.parameter.to_dtype(DType::F32)? * (1.0 - work.at.lr * work.at.decay))?;
        Ok(((kept - (direction * work.at.lr)?)?.to_dtype(work.parameter.dtype())?, vec![m]))
    }
}
