//! LoRA-FA: A stays as it was drawn, B is trained, by the gradient that brings the change closest to full fine-tuning's.
//!
//! Equation: g(B) <- (1 / s^2) g(B) (A A^T + d I)^-1, the minimiser of |s g(B) A - dL/dW|; or g(B) as it is
//! Shapes:   A [r, d_in] frozen; B [d_out, r]; s scalar; d = 1e-8
//! Source:   arXiv 2308.03303; the correction as in PEFT's `LoraFAOptimizer`, which multiplies in bf16 and this in f32
//! Cost:     2 r^2 (d_in + d_out) FLOPs a site and step; half of LoRA's gradients and moments

use candle_core::Tensor;
use espalier_adapters::Parameter;
use espalier_adapters::parameter::Role;
use serde::{Deserialize, Serialize};

use super::{Dynamics, Example, Fit, Moving, Rates, Settings, Sums};
use crate::pairs::{Pair, pairs};
use crate::small::Eigen;
use crate::Result;

/// Keeps a singular A A^T apart from 0.
const DAMPING: f64 = 1e-8;

/// How LoRA-FA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraFa {
    /// Train B by the corrected gradient instead of its own.
    pub corrected: bool,
}

impl Default for LoraFa {
    fn default() -> Self {
        Self { corrected: true }
    }
}

impl Settings for LoraFa {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        Ok(State { corrected: self.corrected, pairs: pairs("lora-fa", fit.model, fit.attached)? })
    }

    fn examples() -> Vec<Example<Self>> {
        let adapter = "method = 'lora'\nr = 3";
        vec![
            Example { name: "as it comes", settings: Self::default(), adapter },
            Example { name: "uncorrected", settings: Self { corrected: false }, adapter },
        ]
    }
}

/// The products of a run.
#[derive(Debug)]
pub struct State {
    corrected: bool,
    pairs: Vec<Pair>,
}

/// The gradient of B that the change s B A follows dL/dW best by, from the gradient `g` of B.
///
/// # Errors
/// If shapes do not fit.
pub fn corrected(g: &Tensor, a: &Tensor, scale: f64) -> Result<Tensor> {
    let inverse = Eigen::of_rows(a)?.inverse(DAMPING, g)?;
    Ok((g.matmul(&inverse)? / (scale * scale))?)
}

impl Dynamics for State {
    fn trains(&self, parameter: &Parameter) -> bool {
        parameter.role != Role::Down
    }

    fn gradients(&mut self, _: &mut Moving<'_>, sums: &mut Sums, _: Rates) -> Result<()> {
        if !self.corrected {
            return Ok(());
        }
        for pair in &self.pairs {
            if let Some(Some(sum)) = pair.up.index.and_then(|i| sums.get_mut(i)) {
                *sum = corrected(sum, &pair.down.tensor, pair.scale)?;
            }
        }
        Ok(())
    }
}
