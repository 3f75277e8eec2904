//! IA3: one learned factor for every output of a map, or for every input of a feed-forward one.
//!
//! Equation: y = l * (W x + bias); in feed-forward maps y = W (l * x) + bias
//! Shapes:   x [.., d_in] -> y [.., d_out]; l `[d_out]`, or `[d_in]` in feed-forward maps, trained
//! Source:   arXiv 2205.05638 section 3.3; l starts at 1. PEFT scales the bias with the output, and so does this
//! Cost:     one multiplication an output (or input) and token; d_out or d_in parameters a layer

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site};
use crate::formats::peft_config::PeftNames;
use crate::target::{Pattern, full, near_misses};
use crate::{Error, Flow, ParameterMap, Result};

const KEY: &str = "feedforward_modules";

/// What the second map of a feed-forward block is called.
const FEEDFORWARD: &str = r".*(?:down_proj|fc2|wo|mlp\.c_proj|\d\.output\.dense|dense_4h_to_h)";

/// How IA3 is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3 {
    /// Feed-forward maps, whose inputs are scaled: a regular expression on the whole path, or path endings.
    pub feedforward_modules: Pattern,
}

impl Default for Ia3 {
    fn default() -> Self {
        Self { feedforward_modules: Pattern::Expression(FEEDFORWARD.to_owned()) }
    }
}

impl Ia3 {
    /// Whether the map at `path` is a feed-forward one. Endings are of the text, not of whole names, as in PEFT.
    fn is_feedforward(&self, path: &str) -> Result<bool> {
        Ok(match &self.feedforward_modules {
            Pattern::Expression(text) => full(KEY, text)?.is_match(path),
            Pattern::Endings(names) => names.iter().any(|name| path.ends_with(name)),
        })
    }
}

impl Method for Ia3 {
    type Layer = Ia3Layer;

    const PEFT: Option<PeftNames> = Some(PeftNames { kind: "IA3", keys: &[], fixed: &[] });
    const TENSORS: &'static [&'static str] = &["ia3_l"];

    fn check_sites(&self, paths: &[&str]) -> Result<()> {
        let named = |pattern: &str| Error::NoTarget {
            key: KEY,
            pattern: pattern.to_owned(),
            near_misses: near_misses(pattern, paths.iter().map(|p| (*p).to_owned())),
        };
        match &self.feedforward_modules {
            Pattern::Endings(names) => match names.iter().find(|name| !paths.iter().any(|p| p.ends_with(*name))) {
                Some(name) => Err(named(name)),
                None => Ok(()),
            },
            Pattern::Expression(text) if text == FEEDFORWARD => Ok(()),
            Pattern::Expression(text) => {
                let pattern = full(KEY, text)?;
                if paths.iter().any(|p| pattern.is_match(p)) { Ok(()) } else { Err(named(text)) }
            }
        }
    }

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<Ia3Layer> {
        site.refuse_lookup("ia3")?;
        let feedforward = self.is_feedforward(&site.path)?;
        let shape = if feedforward { (1, site.d_in) } else { (site.d_out, 1) };
        Ok(Ia3Layer { factors: init.constant("ia3_l", shape, 1.0)?, feedforward })
    }

    fn examples() -> Vec<(String, Self)> {
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("outputs alone".to_owned(), Self { feedforward_modules: Pattern::Endings(Vec::new()) }),
        ]
    }
}

/// The factors at one site.
#[derive(Debug)]
pub struct Ia3Layer {
    /// [1, d_in] in feed-forward maps, else [d_out, 1].
    factors: Tensor,
    feedforward: bool,
}

impl Adapter for Ia3Layer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, _flow: &Flow) -> Result<Tensor> {
        let factors = self.factors.flatten_all()?;
        let scaled = |t: &Tensor| t.to_dtype(factors.dtype())?.broadcast_mul(&factors)?.to_dtype(x.dtype());
        match self.feedforward {
            true => Ok(base.forward(&scaled(x)?)?),
            false => Ok(scaled(&base.forward(x)?)?),
        }
    }

    /// (l - 1) * W, by columns or rows.
    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        let change = (self.factors.detach().to_dtype(DType::F32)? - 1.0)?;
        Ok(Some(base.dequantize(DType::F32)?.broadcast_mul(&change)?))
    }

    fn bias_gain(&self) -> Result<Option<Tensor>> {
        if self.feedforward { Ok(None) } else { Ok(Some(self.factors.flatten_all()?)) }
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("ia3_l", &self.factors, true);
        map
    }
}
