//! Perplexity: how surprised the model is by the trained tokens of examples.
//!
//! Equation: loss = sum over trained tokens of -ln p(token | those before) / their number; perplexity = e^loss
//! Shapes:   labels `[t]`, -100 where not counted; the first token of a row is never counted, nothing predicts it

use espalier_data::{Example, IGNORE};
use espalier_models::Model;
use serde::{Deserialize, Serialize};

use super::losses::{Target, token_losses};
use super::{EvalOptions, Progress, Refused, batches, expect_decoder, refuse};
use crate::limits::longest;
use crate::{Error, Result};

/// Perplexity over examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Examples that counted.
    pub used: usize,
    /// Examples that did not, by reason.
    pub refused: Refused,
    /// Tokens that counted.
    pub tokens: usize,
    /// Mean loss of a token, in nats.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
}

/// Perplexity of `model` over the labelled tokens of `examples`, each token with equal weight.
///
/// # Errors
/// If the model is no decoder, a label is outside its vocabulary, or no example is left.
pub fn perplexity(
    model: &Model,
    examples: &[Example],
    options: &EvalOptions,
    progress: Progress<'_>,
) -> Result<Perplexity> {
    expect_decoder(model, "perplexity")?;
    let mut refused = Refused::new();
    let longest = longest(model);
    let mut used: Vec<usize> = Vec::new();
    for (index, example) in examples.iter().enumerate() {
        check_labels(index, example, model.config().vocab)?;
        if example.trained_tokens() == 0 {
            refuse(&mut refused, "no_trained_token");
        } else if example.input_ids.len() > longest {
            refuse(&mut refused, "longer_than_the_model");
        } else {
            used.push(index);
        }
    }
    if used.is_empty() {
        return Err(Error::Empty { rows: examples.len(), refused });
    }
    let used: Vec<&Example> = used.iter().filter_map(|i| examples.get(*i)).collect();
    let lengths: Vec<usize> = used.iter().map(|e| e.input_ids.len()).collect();
    // Losses by example, so that the sum does not depend on the batches.
    let mut sums = vec![0.0; used.len()];
    let (mut tokens, mut done) = (0, 0);
    for batch in batches(model, &lengths, options)? {
        let mut targets = Vec::new();
        let mut rows = Vec::with_capacity(batch.len());
        for (row, example) in batch.iter().filter_map(|i| used.get(*i)).enumerate() {
            rows.push(example.input_ids.clone());
            let labelled = example.labels.iter().enumerate().skip(1).filter(|(_, label)| **label != IGNORE);
            targets.extend(labelled.map(|(place, label)| Target { row, place, id: *label as u32 }));
        }
        for (target, loss) in targets.iter().zip(token_losses(model, &rows, &targets)?) {
            if let Some(sum) = batch.get(target.row).and_then(|i| sums.get_mut(*i)) {
                *sum += loss;
            }
        }
        tokens += targets.len();
        done += batch.len();
        progress(done, used.len());
    }
    let loss = sums.iter().sum::<f64>() / tokens as f64;
    Ok(Perplexity { used: used.len(), refused, tokens, loss, perplexity: loss.exp() })
}

fn check_labels(index: usize, example: &Example, vocab: usize) -> Result<()> {
    let fault = |message: String| Error::Example { index, message };
    if example.labels.len() != example.input_ids.len() {
        return Err(fault(format!("{} labels for {} tokens", example.labels.len(), example.input_ids.len())));
    }
    let outside = |label: &i32| *label != IGNORE && usize::try_from(*label).map_or(true, |l| l >= vocab);
    match example.labels.iter().enumerate().find(|(_, label)| outside(label)) {
        Some((at, label)) => Err(fault(format!(
            "label {label} of token {at} is outside the model's vocabulary of {vocab}; the tokenizer is another model's"
        ))),
        None => Ok(()),
    }
}
