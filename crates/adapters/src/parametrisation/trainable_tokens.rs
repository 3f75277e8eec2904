//! Trainable tokens: the vectors of some tokens are trained in place of the table's own, and nothing else.
//!
//! Equation: e(t) = v_t for the chosen tokens t, the table's row for all others; the scores of a tied head use v_t as well
//! Shapes:   ids [..] -> vectors [.., width]; v [n, width] trained
//! Source:   PEFT's `TRAINABLE_TOKENS`
//! Cost:     what the lookup costs; n width parameters

use serde::{Deserialize, Serialize};

use crate::adapter::{Method, NoLayer, Reach};
use crate::formats::peft_config::PeftNames;

/// Which rows are trained. The table is the input embedding unless the targets say otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainableTokens {
    /// Ids of the tokens, distinct.
    pub token_indices: Vec<u32>,
    /// Whether the rows start as the table's, or drawn from the standard normal distribution.
    pub init_weights: bool,
}

impl Default for TrainableTokens {
    fn default() -> Self {
        Self { token_indices: Vec::new(), init_weights: true }
    }
}

impl Method for TrainableTokens {
    type Layer = NoLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames { kind: "TRAINABLE_TOKENS", keys: &[], fixed: &[] });

    fn reach(&self) -> Reach<'_> {
        Reach::Rows { tokens: &self.token_indices, copied: self.init_weights }
    }

    fn starts_at_base(&self) -> bool {
        self.init_weights
    }

    fn examples() -> Vec<(String, Self)> {
        let some = Self { token_indices: vec![3, 9, 0], ..Self::default() };
        vec![("copied".to_owned(), some.clone()), ("drawn".to_owned(), Self { init_weights: false, ..some })]
    }
}
