//! Plain training: every parameter by its own gradient.
//!
//! Equation: p <- the optimiser's update of p by its gradient
//! Shapes:   any
//! Source:   the baseline of every other dynamics
//! Cost:     none beside the optimiser's

use serde::{Deserialize, Serialize};

use super::{Dynamics, Example, Fit, Settings};
use crate::Result;

/// Plain training has no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plain {}

impl Settings for Plain {
    type State = Self;

    fn fit(&self, _: &mut Fit<'_>) -> Result<Self> {
        Ok(self.clone())
    }

    fn examples() -> Vec<Example<Self>> {
        vec![Example { name: "as it comes", settings: Self {}, adapter: "method = 'lora'\nr = 3\ndropout = 0.1" }]
    }
}

impl Dynamics for Plain {}
