//! Kaiming-uniform A and zero B: the update starts at zero.
//!
//! Equation: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0; for lookups A = 0, B ~ N(0, 1)
//! Shapes:   A [r, d_in], B [d_out, r]
//! Source:   arXiv 2106.09685 section 4.1; PEFT `reset_lora_parameters` (kaiming_uniform with a = sqrt(5))
//! Cost:     r d_in draws a layer

use serde::{Deserialize, Serialize};

use super::{Factors, Start, shapes};
use crate::adapter::{Init, Site};
use crate::parametrisation::lora::LoraLayer;
use crate::{Result, random};

/// Kaiming-uniform A and zero B have no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kaiming {}

impl Start for Kaiming {
    fn factors(&self, site: &Site, _scale: f64, init: &mut Init<'_>) -> Result<Factors> {
        let (shape_a, shape_b) = shapes(site);
        let (name_a, name_b) = LoraLayer::names(site.lookup);
        if site.lookup {
            let a = init.zeros(name_a, shape_a)?;
            let b = init.trainable(name_b, shape_b, |rng, shape, device| random::normal(rng, 1.0, shape, device))?;
            return Ok(Factors { a, b, moved: None });
        }
        let bound = 1.0 / (site.d_in as f64).sqrt();
        let a = init.trainable(name_a, shape_a, |rng, shape, device| random::uniform(rng, bound, shape, device))?;
        Ok(Factors { a, b: init.zeros(name_b, shape_b)?, moved: None })
    }
}
