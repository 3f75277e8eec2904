//! Muon: the momentum of a matrix, made nearly orthogonal; AdamW for all that is no matrix.
//!
//! Equation: u <- mu u + (1 - mu) g; d = (1 - mu) g + mu u; X = d / |d|; five times X <- a X + (b (X X^T) + c (X X^T)^2) X;
//!           p <- p (1 - lr wd) - lr k X, with k = sqrt(max(1, m / n)), or 0.2 sqrt(max(m, n)) for AdamW's learning rates
//! Shapes:   p, g, u, X [m, n]; X^T in place of X where m > n
//! Source:   torch.optim.Muon (a, b, c = 3.4445, -4.7750, 2.0315), which iterates in bf16, and this in f32
//! Cost:     10 min(m, n)^2 (2 max(m, n) + min(m, n)) FLOPs a matrix and step; half of AdamW's moments

use candle_core::{DType, Tensor};

use super::adamw::AdamW;
use super::sgd::checked_momentum;
use super::{Rule, Work};
use crate::recipe::Recipe;
use crate::{Error, Result};

/// The iteration's polynomial and its number of steps.
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
const ITERATIONS: usize = 5;
const EPS: f32 = 1e-7;

/// The factor on the learning rate of a matrix [m, n].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adjust {
    /// sqrt(max(1, m / n)).
    Original,
    /// 0.2 sqrt(max(m, n)): updates as large as AdamW's.
    MatchRmsAdamw,
}

/// Names of the factors.
pub const ADJUST: &[&str] = &["original", "match_rms_adamw"];

/// The rule's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Nesterov's form of it.
    pub nesterov: bool,
    /// The factor on the learning rate.
    pub adjust: Adjust,
    /// What moves vectors.
    pub vectors: AdamW,
}

impl Muon {
    /// The recipe's settings.
    ///
    /// # Errors
    /// If the momentum or the factor on the learning rate is not valid.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        let adjust = match recipe.muon_adjust_lr.as_str() {
            "original" => Adjust::Original,
            "match_rms_adamw" => Adjust::MatchRmsAdamw,
            other => {
                return Err(Error::recipe("muon_adjust_lr", espalier_adapters::config::unknown_value(other, ADJUST)));
            }
        };
        let momentum = checked_momentum(recipe.momentum.unwrap_or(0.95))?;
        Ok(Self { momentum, nesterov: recipe.nesterov, adjust, vectors: AdamW::of(recipe)? })
    }
}

/// A matrix with the singular vectors of `d` [m, n] and singular values near 1.
///
/// # Errors
/// If `d` is no matrix.
pub fn orthogonalised(d: &Tensor) -> Result<Tensor> {
    let (m, n) = d.dims2()?;
    let mut x = if m > n { d.t()?.contiguous()? } else { d.clone() };
    let norm = x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?.max(EPS);
    x = (x / f64::from(norm))?;
    let (a, b, c) = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let gram = x.matmul(&x.t()?)?;
        let polynomial = ((&gram * b)? + (gram.matmul(&gram)? * c)?)?;
        x = ((&x * a)? + polynomial.matmul(&x)?)?;
    }
    Ok(if m > n { x.t()?.contiguous()? } else { x })
}

impl Rule for Muon {
    fn slots(&self, dims: &[usize]) -> &'static [&'static str] {
        if dims.len() == 2 { &["u"] } else { self.vectors.slots(dims) }
    }

    fn update(&self, work: &Work<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        let &[m, n] = work.parameter.dims() else { return self.vectors.update(work) };
        let g = (work.gradient * work.at.scale)?;
        let u = ((&work.slots[0] * self.momentum)? + (&g * (1.0 - self.momentum))?)?;
        let direction =
            if self.nesterov { ((g * (1.0 - self.momentum))? + (&u * self.momentum)?)? } else { u.clone() };
        let (m, n) = (m as f64, n as f64);
        let factor = match self.adjust {
            Adjust::Original => (m / n).max(1.0).sqrt(),
            Adjust::MatchRmsAdamw => 0.2 * m.max(n).sqrt(),
        };
        let step = (orthogonalised(&direction)? * (work.at.lr * factor))?;
        let kept = (work.parameter.to_dtype(DType::F32)? * (1.0 - work.at.lr * work.at.decay))?;
        Ok(((kept - step)?.to_dtype(work.parameter.dtype())?, vec![u]))
    }
}
