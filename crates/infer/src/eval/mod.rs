//! Evaluation: each file scores a model in one way and returns its score with the rows used and refused, by reason.
//!
//! Perplexity and classification take encoded examples, exact match rows, choice accuracy questions with choices. The
//! score of a row does not depend on the other rows.

mod choice;
mod classification;
mod exact_match;
mod losses;
pub mod metrics;
mod perplexity;
mod question;

use std::collections::BTreeMap;

use espalier_data::TextCodec;
use espalier_models::Model;
use serde::{Deserialize, Serialize};

pub use choice::{ChoiceAccuracy, ChoiceAnswer, choice_accuracy};
pub use classification::{Classification, classification};
pub use exact_match::{ExactMatch, Pair, exact_match};
pub use perplexity::{Perplexity, perplexity};
pub use question::{ChoiceColumns, ChoiceRow};

use crate::limits::table_follows_length;
use crate::{Error, Result};

/// Rows that were not used, counted by reason.
pub type Refused = BTreeMap<String, usize>;

/// Called with what is done and how much there is in all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// How examples are evaluated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalOptions {
    /// Sequences that run together.
    pub batch_size: usize,
    /// Classification: the token behind the first text of a pair; those after it get segment type 1. See
    /// [`pair_separator`].
    pub separator: Option<u32>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self { batch_size: 16, separator: None }
    }
}

/// The token between the texts of a pair, where the model tells them apart by segment types (BERT's `[SEP]`).
pub fn pair_separator(model: &Model, codec: &TextCodec) -> Option<u32> {
    model.config().token_types.filter(|types| *types > 1)?;
    codec.tokenizer()?.token_to_id("[SEP]")
}

/// Counts one refused row.
fn refuse(refused: &mut Refused, reason: &str) {
    *refused.entry(reason.to_owned()).or_default() += 1;
}

/// Batches of indices of rows with these lengths, the longest first, equal lengths in their order.
fn batches(model: &Model, lengths: &[usize], options: &EvalOptions) -> Result<Vec<Vec<usize>>> {
    if options.batch_size == 0 {
        return Err(Error::option("batch_size", 0, "must be at least 1"));
    }
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    let length = |i: &usize| lengths.get(*i).copied().unwrap_or(0);
    order.sort_by_key(|i| std::cmp::Reverse(length(i)));
    let mut out = Vec::new();
    let mut rest = order.as_slice();
    while let Some(longest) = rest.first().map(length) {
        let size = if table_follows_length(model.config(), longest) { 1 } else { options.batch_size };
        let (batch, later) = rest.split_at(size.min(rest.len()));
        out.push(batch.to_vec());
        rest = later;
    }
    Ok(out)
}

/// An error unless the model predicts tokens from the ones before.
fn expect_decoder(model: &Model, task: &'static str) -> Result<()> {
    if model.config().causal && model.config().labels().is_none() {
        return Ok(());
    }
    Err(Error::Kind {
        family: model.config().family.clone(),
        task,
        message: "it needs a decoder, which predicts each token from those before",
    })
}

/// `part` of `whole`, 0 of nothing.
fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
