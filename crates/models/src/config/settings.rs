//! The settings of an architecture that change what its weights compute, as texts by name: what an adapter's file records of its
//! base beside the hash of the weights. Sizes are not among them, for the weights have them.

use std::collections::BTreeMap;

use espalier_adapters::module::NormKind;
use espalier_kernels::activation::Activation;

use super::rope::{RopeScaling, RopeSpec};
use super::{ModelConfig, NormPlacement, Positions};

fn list(values: &[f64]) -> String {
    values.iter().map(f64::to_string).collect::<Vec<_>>().join(" ")
}

fn rope(spec: &RopeSpec) -> String {
    let scaling = match &spec.scaling {
        RopeScaling::None => "not scaled".to_owned(),
        RopeScaling::Linear { factor } => format!("linear {factor}"),
        RopeScaling::Dynamic { factor } => format!("dynamic {factor} from {}", spec.max_positions),
        RopeScaling::Llama3 { factor, low, high, original } => {
            format!("llama3 {factor}, low {low}, high {high}, original {original}")
        }
        RopeScaling::Yarn { factor, attention, beta_fast, beta_slow, original, truncate } => format!(
            "yarn {factor}, attention {attention}, beta {beta_fast} to {beta_slow}, original {original}, truncated {truncate}"
        ),
        RopeScaling::LongRope { short, long, attention, original } => {
            format!("longrope {} / {}, attention {attention}, original {original}", list(short), list(long))
        }
    };
    format!("rotary, theta {}, {} of each head, {scaling}", spec.theta, spec.dim)
}

fn windows(windows: &[Option<usize>]) -> String {
    let one = |w: &Option<usize>| w.map_or_else(|| "none".to_owned(), |n| n.to_string());
    match windows.split_first() {
        Some((first, rest)) if rest.iter().all(|w| w == first) => one(first),
        _ => windows.iter().map(one).collect::<Vec<_>>().join(" "),
    }
}

impl ModelConfig {
    /// What changes the function that the weights make, by name.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let optional = |value: Option<f64>| value.map_or_else(|| "none".to_owned(), |v| v.to_string());
        let activation = match self.activation {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu (tanh)",
            Activation::Relu => "relu",
            Activation::QuickGelu => "quick gelu",
            Activation::Tanh => "tanh",
        };
        let pairs = [
            (
                "norm",
                match self.norm {
                    NormKind::Rms { eps, offset } => format!("rms, epsilon {eps}, offset {offset}"),
                    NormKind::Layer { eps } => format!("layer, epsilon {eps}"),
                },
            ),
            (
                "norm placement",
                match self.placement {
                    NormPlacement::Pre => "before",
                    NormPlacement::Post => "after",
                    NormPlacement::Sandwich => "before and after",
                }
                .to_owned(),
            ),
            ("activation", format!("{activation}{}", if self.gated { ", gated" } else { "" })),
            (
                "positions",
                match &self.positions {
                    Positions::Rope(spec) => rope(spec),
                    Positions::Learned { offset, .. } => format!("learned, from row {offset}"),
                },
            ),
            ("heads", format!("{} of {}, {} for keys and values", self.heads, self.head_dim, self.kv_heads)),
            ("attention windows", windows(&self.windows)),
            ("attention scale", self.attention_scale.to_string()),
            ("attention soft cap", optional(self.attention_softcap)),
            ("score soft cap", optional(self.final_softcap)),
            ("embedding scale", optional(self.embed_scale)),
            ("causal", self.causal.to_string()),
            ("tied", self.tied.to_string()),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
