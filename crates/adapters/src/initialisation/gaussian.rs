//! Normal A and zero B: the update starts at zero.
//!
//! Equation: A ~ N(0, 1/r^2), B = 0; for lookups A = 0, B ~ N(0, 1)
//! Shapes:   A [r, d_in], B [d_out, r]
//! Source:   PEFT `init_lora_weights="gaussian"`, as diffusers trains
//! Cost:     r d_in draws a layer

use serde::{Deserialize, Serialize};

use super::kaiming::Kaiming;
use super::{Factors, Start, shapes};
use crate::adapter::{Init, Site};
use crate::parametrisation::lora::LoraLayer;
use crate::{Result, random};

/// Normal A and zero B have no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gaussian {}

impl Start for Gaussian {
    fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
        if site.lookup {
            return Kaiming {}.factors(site, scale, init);
        }
        let (shape_a, shape_b) = shapes(site);
        let (name_a, name_b) = LoraLayer::names(false);
        let std = 1.0 / site.rank as f64;
        let a = init.trainable(name_a, shape_a, |rng, shape, device| random::normal(rng, std, shape, device))?;
        Ok(Factors { a, b: init.zeros(name_b, shape_b)?, moved: None })
    }
}
