//! Rotary positions: the frequencies of each scaling scheme.
//!
//! Equation: theta_i = base^(-2 i / d); each scheme changes theta (and a factor on cos and sin)
//! Shapes:   d/2 frequencies; cos and sin are [b, t, d/2]
//! Source:   arXiv 2104.09864; linear arXiv 2306.15595, dynamic NTK and yarn arXiv 2309.00071, longrope arXiv 2402.13753,
//!           llama3 as in the Llama 3.1 release; formulas as transformers' `modeling_rope_utils`

use super::Json;
use crate::Result;

/// Rotary embedding of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated part of each head.
    pub dim: usize,
    /// Longest sequence of the model.
    pub max_positions: usize,
    /// Scaling scheme.
    pub scaling: RopeScaling,
}

/// How the frequencies are stretched for longer sequences.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by the factor.
    Linear {
        /// Factor.
        factor: f64,
    },
    /// Base grown once a sequence is longer than the model's.
    Dynamic {
        /// Factor.
        factor: f64,
    },
    /// Low frequencies stretched, high ones kept, smooth between.
    Llama3 {
        /// Factor.
        factor: f64,
        /// Wavelengths above original / low are stretched.
        low: f64,
        /// Wavelengths below original / high are kept.
        high: f64,
        /// Sequence length of pre-training.
        original: f64,
    },
    /// A ramp between interpolation and extrapolation, and a factor on cos and sin.
    Yarn {
        /// Factor.
        factor: f64,
        /// Factor on cos and sin.
        attention: f64,
        /// Rotations at the fast end of the ramp.
        beta_fast: f64,
        /// Rotations at the slow end.
        beta_slow: f64,
        /// Sequence length of pre-training.
        original: f64,
        /// Whether the ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// A factor for each frequency, one list for short and one for long sequences.
    LongRope {
        /// Factors up to the original length.
        short: Vec<f64>,
        /// Factors beyond.
        long: Vec<f64>,
        /// Factor on cos and sin.
        attention: f64,
        /// Sequence length of pre-training.
        original: usize,
    },
}

impl RopeSpec {
    /// Reads the keys of a `config.json`; `head_dim` is the width of a head.
    pub(crate) fn read(json: &Json<'_>, head_dim: usize) -> Result<Self> {
        let nested = match json.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => json.object("rope_scaling")?,
        };
        let max_positions = json.usize_or("max_position_embeddings", 2048)?;
        let own_theta = nested.as_ref().map(|n| n.f64_opt("rope_theta")).transpose()?.flatten();
        let theta = match own_theta {
            Some(theta) => theta,
            None => json.f64_or("rope_theta", 10_000.0)?,
        };
        let own_partial = nested.as_ref().map(|n| n.f64_opt("partial_rotary_factor")).transpose()?.flatten();
        let partial = match own_partial {
            Some(partial) => partial,
            None => json.f64_or("partial_rotary_factor", 1.0)?,
        };
        if !(theta > 0.0 && theta.is_finite()) {
            return Err(json.error("rope_theta", format!("{theta} is not a positive number")));
        }
        if !(partial > 0.0 && partial <= 1.0) {
            return Err(json.error("partial_rotary_factor", format!("{partial} is not within (0, 1]")));
        }
        let dim = (head_dim as f64 * partial) as usize;
        let scaling = match &nested {
            Some(nested) => scaling(json, nested, max_positions, dim)?,
            None => RopeScaling::None,
        };
        Ok(Self { theta, dim, max_positions, scaling })
    }

    /// The frequencies for a sequence whose last position is `length - 1`, and the factor on cos and sin.
    pub fn frequencies(&self, length: usize) -> (Vec<f64>, f64) {
        let half = self.dim / 2;
        let powers = |base: f64| (0..half).map(move |i| base.powf(-((2 * i) as f64) / self.dim as f64));
        let plain: Vec<f64> = powers(self.theta).collect();
        match &self.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Dynamic { factor } => {
                let max = self.max_positions as f64;
                let length = (length as f64).max(max);
                let d = self.dim as f64;
                let base = self.theta * ((factor * length / max) - (factor - 1.0)).powf(d / (d - 2.0));
                (powers(base).collect(), 1.0)
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                let stretch = |f: &f64| {
                    let wavelength = std::f64::consts::TAU / f;
                    if wavelength > original / low {
                        f / factor
                    } else if wavelength < original / high {
                        *f
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (plain.iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, attention, beta_fast, beta_slow, original, truncate } => {
                let d = self.dim as f64;
                let dimension = |rotations: f64| {
                    d * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(d - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blend = |(i, f): (usize, &f64)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                };
                (plain.iter().enumerate().map(blend).collect(), *attention)
            }
            RopeScaling::LongRope { short, long, attention, original } => {
                let factors = if length > *original { long } else { short };
                (plain.iter().zip(factors).map(|(f, by)| f / by).collect(), *attention)
            }
        }
    }
}

fn scaling(json: &Json<'_>, nested: &Json<'_>, max_positions: usize, dim: usize) -> Result<RopeScaling> {
    let kind = match nested.str_opt("rope_type")? {
        Some(kind) => kind,
        None => nested.str_opt("type")?.unwrap_or("default"),
    };
    let need = |key: &str| {
        nested.f64_opt(key).and_then(|v| v.ok_or_else(|| json.error("rope_scaling", format!("`{key}` is missing"))))
    };
    let original = match nested.usize_opt("original_max_position_embeddings")? {
        Some(n) => Some(n),
        None => json.usize_opt("original_max_position_embeddings")?,
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: original.unwrap_or(max_positions) as f64,
        },
        "yarn" => {
            let original = original.unwrap_or(max_positions) as f64;
            let factor = match nested.f64_opt("factor")? {
                Some(factor) => factor,
                None => max_positions as f64 / original,
            };
            let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            let attention = match nested.f64_opt("attention_factor")? {
                Some(given) => given,
                None => match (nested.f64_opt("mscale")?, nested.f64_opt("mscale_all_dim")?) {
                    (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
                    _ => scale(1.0),
                },
            };
            RopeScaling::Yarn {
                factor,
                attention,
                beta_fast: nested.f64_or("beta_fast", 32.0)?,
                beta_slow: nested.f64_or("beta_slow", 1.0)?,
                original,
                truncate: nested.bool_or("truncate", true)?,
            }
        }
        "longrope" | "su" => {
            let list = |key: &str| -> Result<Vec<f64>> {
                let list =
                    nested.floats(key)?.ok_or_else(|| json.error("rope_scaling", format!("`{key}` is missing")))?;
                if list.len() != dim / 2 {
                    let found = list.len();
                    return Err(
                        json.error("rope_scaling", format!("`{key}` must have {} values, has {found}", dim / 2))
                    );
                }
                Ok(list)
            };
            let original = original.unwrap_or(max_positions);
            let factor = match json.usize_opt("original_max_position_embeddings")? {
                Some(original) => max_positions as f64 / original as f64,
                None => nested.f64_or("factor", max_positions as f64 / original as f64)?,
            };
            let attention = match nested.f64_opt("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
            };
            RopeScaling::LongRope { short: list("short_factor")?, long: list("long_factor")?, attention, original }
        }
        other => {
            return Err(json.error(
                "rope_scaling",
                format!(
                    "type `{other}` is not supported (supported: default, linear, dynamic, llama3, yarn, longrope)"
                ),
            ));
        }
    })
}
