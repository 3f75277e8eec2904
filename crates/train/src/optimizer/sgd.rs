//! Stochastic gradient descent, plain or with momentum.
//!
//! Equation: p <- p (1 - lr wd); u <- mu u + g; p <- p - lr (g + mu u), or - lr u without Nesterov's form
//! Shapes:   p, g, u of one shape; without momentum there is no u
//! Source:   torch.optim.SGD, whose weight decay is a part of the gradient; here it is decoupled (SGDW, arXiv 1711.05101
//!           algorithm 1), which is the same without momentum
//! Cost:     4 FLOPs and 20 bytes a parameter and step with momentum

use candle_core::{DType, Tensor};

use super::{Rule, Work};
use crate::recipe::Recipe;
use crate::{Error, Result};

/// The rule's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Share of the last direction that stays; 0: none is kept.
    pub momentum: f64,
    /// Nesterov's form of it.
    pub nesterov: bool,
}

impl Sgd {
    /// The recipe's settings.
    ///
    /// # Errors
    /// If the momentum is not at least 0 and below 1.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        let momentum = checked_momentum(recipe.momentum.unwrap_or(0.0))?;
        Ok(Self { momentum, nesterov: recipe.nesterov })
    }
}

/// A momentum that does not grow for ever.
pub(super) fn checked_momentum(momentum: f64) -> Result<f64> {
    match (0.0..1.0).contains(&momentum) {
        true => Ok(momentum),
        false => Err(Error::recipe("momentum", format!("{momentum} is not at least 0 and below 1"))),
    }
}

impl Rule for Sgd {
    fn slots(&self, _: &[usize]) -> &'static [&'static str] {
        if self.momentum > 0.0 { &["u"] } else { &[] }
    }

    fn update(&self, work: &Work<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        let g = (work.gradient * work.at.scale)?;
        let (direction, slots) = match work.slots.first() {
            None => (g, Vec::new()),
            Some(u) => {
                let u = ((u * self.momentum)? + &g)?;
                (if self.nesterov { (g + (&u * self.momentum)?)? } else { u.clone() }, vec![u])
            }
        };
        let kept = (work.parameter.to_dtype(DType::F32)? * (1.0 - work.at.lr * work.at.decay))?;
        Ok(((kept - (direction * work.at.lr)?)?.to_dtype(work.parameter.dtype())?, slots))
    }
}
