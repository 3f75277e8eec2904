//! LoRA+: the side of a low-rank product that writes the output, and vectors beside it, learn faster.
//!
//! Equation: lr(B) = ratio lr(A)
//! Shapes:   any
//! Source:   arXiv 2402.12354 eq. 8 (a ratio of 16); groups as in PEFT's `create_loraplus_optimizer`
//! Cost:     none

use espalier_adapters::Parameter;
use espalier_adapters::parameter::Role;
use serde::{Deserialize, Serialize};

use super::{Dynamics, Example, Fit, Settings, checked_positive};
use crate::Result;
use crate::pairs::unfit;

/// How LoRA+ is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraPlus {
    /// Learning rate of B over that of A.
    pub ratio: f64,
}

impl Default for LoraPlus {
    fn default() -> Self {
        Self { ratio: 16.0 }
    }
}

impl Settings for LoraPlus {
    type State = Self;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<Self> {
        checked_positive("ratio", self.ratio)?;
        if !fit.attached.parameters.trainable().any(|p| p.role == Role::Up) {
            let name = fit.attached.config.method.name();
            return Err(unfit("lora-plus", format!("`{name}` has no low-rank product whose sides could differ")));
        }
        Ok(self.clone())
    }

    fn examples() -> Vec<Example<Self>> {
        vec![Example { name: "as it comes", settings: Self::default(), adapter: "method = 'dora'\nr = 3" }]
    }
}

impl Dynamics for LoraPlus {
    fn factor(&self, parameter: &Parameter) -> f64 {
        if parameter.role == Role::Up || parameter.tensor.rank() == 1 { self.ratio } else { 1.0 }
    }
}
