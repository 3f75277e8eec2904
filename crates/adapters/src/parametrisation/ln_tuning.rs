//! LN tuning: the norms are trained whole, and nothing else.
//!
//! Equation: y = n(x) * w + b, where w and b are trained and n(x) is x over its root mean square, or (x - mean) / std
//! Shapes:   x [.., n] -> y [.., n]; w `[n]`, and b `[n]` where the norm has one, trained
//! Source:   arXiv 2312.11420; other modules that the targets name are trained whole as well, as in PEFT
//! Cost:     what the frozen norm costs; n or 2 n parameters a norm

use serde::{Deserialize, Serialize};

use crate::adapter::{Method, NoLayer, Reach};
use crate::formats::peft_config::PeftNames;

/// LN tuning has no settings but its targets, which are all norms unless they say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LnTuning {}

impl Method for LnTuning {
    type Layer = NoLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames { kind: "LN_TUNING", keys: &[], fixed: &[] });

    fn reach(&self) -> Reach<'_> {
        Reach::Whole
    }
}
