//! LoRA-GA: the factors start as singular vectors of the gradient of the frozen weight, and leave the base.
//!
//! Equation: G = U S V^T; A = c_A V[:, I_A]^T, B = c_B U[:, I_B]; the frozen part becomes W - s B A. I_A = 1 .. r, I_B = r + 1 .. 2r;
//!           c_A = c_B = d_out^(1/4) / sqrt(gamma)
//! Shapes:   G [d_out, d_in], A [r, d_in], B [d_out, r]
//! Source:   arXiv 2407.05000 algorithm 1 (with s = alpha / sqrt(r), the setting `rslora`); the other directions and scales as its
//!           code has them; PEFT's own scale is `stable_peft`
//! Cost:     one pass over `rows` rows and one SVD a layer; one more copy of the adapted weights

use candle_core::{DType, Tensor};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::{Factors, Start, from_data, shapes};
use crate::adapter::{Evidence, EvidenceKind, Init, Site, Wanted};
use crate::{Result, decomposition, random};

/// Which of the first 2r singular vectors go into A and B.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// A the first r, B the next.
    #[default]
    ArB2r,
    /// B the first r, A the next.
    A2rBr,
    /// Alternating, B first.
    ArBr,
    /// A random split.
    #[serde(rename = "random")]
    Random,
}

/// How long the vectors are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// Both d_out^(1/4) / sqrt(gamma).
    #[default]
    Stable,
    /// Both 1.
    Unit,
    /// Both 1 / s.
    Gd,
    /// As PEFT: A of length 1, B times its singular values and d_out^(1/4) / sqrt(gamma).
    StablePeft,
}

/// How LoRA-GA starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraGa {
    /// Which singular vectors go where.
    pub direction: Direction,
    /// How long they are.
    pub scale: Scale,
    /// The constant gamma of the stable scale.
    pub stable_gamma: f64,
    /// Rows of the training data that the gradient is taken over.
    pub rows: usize,
}

impl Default for LoraGa {
    fn default() -> Self {
        Self { direction: Direction::ArB2r, scale: Scale::Stable, stable_gamma: 16.0, rows: 64 }
    }
}

impl LoraGa {
    /// Places (of A, of B) among the singular vectors, of which there are `count`. Where 2r of them do not exist, the two share
    /// some.
    fn places(&self, r: usize, count: usize, seed: u64, path: &str) -> (Vec<u32>, Vec<u32>) {
        let last = count.saturating_sub(r).min(r) as u32;
        let (first, next): (Vec<u32>, Vec<u32>) = ((0..r as u32).collect(), (last..last + r as u32).collect());
        match self.direction {
            Direction::ArB2r => (first, next),
            Direction::A2rBr => (next, first),
            _ if 2 * r > count => (first, next),
            Direction::ArBr => ((0..r as u32).map(|i| 2 * i + 1).collect(), (0..r as u32).map(|i| 2 * i).collect()),
            Direction::Random => {
                let mut all: Vec<u32> = (0..2 * r as u32).collect();
                all.shuffle(&mut random::stream(seed, &format!("{path}.lora_ga")));
                let b = all.split_off(r);
                (all, b)
            }
        }
    }
}

impl Start for LoraGa {
    const MOVES_BASE: bool = true;

    fn wanted(&self) -> Option<Wanted> {
        Some(Wanted { kind: EvidenceKind::Gradient, rows: self.rows })
    }

    fn start_from(&self, site: &Site, scale: f64, evidence: &Evidence<'_>) -> Result<(Tensor, Tensor)> {
        let gradient = evidence.values;
        let (u, s, vt) = decomposition::svd(gradient)?;
        if s.first().is_none_or(|largest| *largest == 0.0) {
            // Nothing is known of a layer that the loss does not depend on: plain LoRA.
            let (shape_a, shape_b) = shapes(site);
            let bound = 1.0 / (site.d_in as f64).sqrt();
            let mut rng = random::stream(evidence.seed, &site.path);
            let a = random::uniform(&mut rng, bound, shape_a, gradient.device())?;
            return Ok((a, Tensor::zeros(shape_b, DType::F32, gradient.device())?));
        }
        let (of_a, of_b) = self.places(site.rank.min(s.len()), s.len(), evidence.seed, &site.path);
        let device = gradient.device();
        let values: Vec<f32> = of_b.iter().map(|i| s[*i as usize] as f32).collect();
        let a = vt.index_select(&Tensor::new(of_a, device)?, 0)?;
        let b = u.index_select(&Tensor::new(of_b, device)?, 1)?;
        let stable = (site.d_out as f64).powf(0.25) / self.stable_gamma.sqrt();
        Ok(match self.scale {
            Scale::Stable => ((a * stable)?, (b * stable)?),
            Scale::Unit => (a, b),
            Scale::Gd => ((a / scale)?, (b / scale)?),
            Scale::StablePeft => (a, (b.broadcast_mul(&Tensor::new(values, device)?)? * stable)?),
        })
    }

    fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
        from_data("lora-ga", Self::MOVES_BASE, site, scale, init)
    }
}
