//! The length limit: which tokens of a longer example stay, and whether that cut through what is trained.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Example, IGNORE, Outcome, TextCodec};
use crate::error::RowError;

/// What happens to examples longer than `max_length`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// Tokens at the end are cut off. An answer that loses its end is trained as far as it goes and teaches no stop there.
    #[default]
    Right,
    /// Tokens at the beginning are cut off; a beginning-of-sequence token stays in front.
    Left,
    /// The example is left out and counted.
    Drop,
    /// The example is a bad row.
    Error,
}

impl fmt::Display for Truncation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Truncation::Right => "right",
            Truncation::Left => "left",
            Truncation::Drop => "drop",
            Truncation::Error => "error",
        })
    }
}

impl TextCodec {
    /// Applies the length limit and refuses what teaches nothing.
    pub(super) fn finish(&self, input_ids: Vec<u32>, labels: Vec<i32>, class: Option<u32>) -> Outcome<Example> {
        let length = input_ids.len();
        if let Some((at, id)) = input_ids.iter().enumerate().find(|(_, id)| **id as usize >= self.vocab_size()) {
            return Err(RowError::TokenId { key: "input_ids", at, id: i64::from(*id), vocab: self.vocab_size() });
        }
        let example = Example { input_ids, labels, class, ..Example::default() };
        let limit = self.options().max_length.filter(|max| length > *max);
        let example = match limit {
            Some(max_length) => self.cut(example, max_length)?,
            None => example,
        };
        let useful = if class.is_some() { !example.input_ids.is_empty() } else { example.trained_tokens() > 0 };
        match (useful, limit) {
            (true, _) => Ok(example),
            (false, Some(max_length)) => Err(RowError::NoTrainedTokenLeft { length, max_length }),
            (false, None) => Err(RowError::NoTrainedToken),
        }
    }

    fn cut(&self, mut example: Example, max_length: usize) -> Outcome<Example> {
        let length = example.input_ids.len();
        let trained = |at: usize| example.labels.get(at).is_some_and(|label| *label != IGNORE);
        let through = |at: usize| at > 0 && trained(at - 1) && trained(at);
        match self.options().truncation {
            Truncation::Right => {
                example.answer_cut = through(max_length);
                example.input_ids.truncate(max_length);
                example.labels.truncate(max_length);
            }
            Truncation::Left => {
                let first = example.input_ids.first().copied();
                let kept = usize::from(max_length > 1 && first.is_some() && first == self.bos_id());
                let from = length - max_length + kept;
                example.answer_cut = through(from);
                example.input_ids.drain(kept..from);
                example.labels.drain(kept..from);
            }
            truncation => return Err(RowError::TooLong { length, max_length, truncation }),
        }
        example.truncated = true;
        Ok(example)
    }
}
