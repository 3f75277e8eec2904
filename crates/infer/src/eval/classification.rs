//! Classification: the label with the highest score against the example's class.

use candle_core::DType;
use espalier_adapters::Flow;
use espalier_data::Example;
use espalier_models::{Model, TokenBatch};
use serde::{Deserialize, Serialize};

use super::metrics::{self, ClassScore};
use super::{EvalOptions, Progress, Refused, batches, refuse};
use crate::limits::longest;
use crate::{Error, Result};

/// Classification scores over examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Classification {
    /// Examples that counted.
    pub used: usize,
    /// Examples that did not, by reason.
    pub refused: Refused,
    /// Share of right labels.
    pub accuracy: f64,
    /// Mean F1 of the classes that occur or were predicted.
    pub macro_f1: f64,
    /// Matthews correlation coefficient, in [-1, 1].
    pub mcc: f64,
    /// Names of the labels, where the model has them.
    pub labels: Option<Vec<String>>,
    /// Precision, recall and F1 of each label.
    pub classes: Vec<ClassScore>,
    /// Examples by class (row) and predicted label (column).
    pub confusion: Vec<Vec<usize>>,
    /// Predicted label of each example; None where it was refused.
    pub predictions: Vec<Option<u32>>,
}

/// Scores of a classifier over `examples`.
///
/// # Errors
/// If the model is no classifier or has no segment types where a separator is given, its scores are not finite, or no example is left.
pub fn classification(
    model: &Model,
    examples: &[Example],
    options: &EvalOptions,
    progress: Progress<'_>,
) -> Result<Classification> {
    let Some(labels) = model.config().labels() else {
        return Err(Error::Kind {
            family: model.config().family.clone(),
            task: "classification",
            message: "it needs a model with a classification head",
        });
    };
    if let Some(separator) = options.separator
        && model.config().token_types.is_none_or(|types| types < 2)
    {
        return Err(Error::option(
            "separator",
            separator,
            "the model does not tell the texts of a pair apart by segment types",
        ));
    }
    let mut refused = Refused::new();
    let longest = longest(model);
    let mut used = Vec::new();
    for (index, example) in examples.iter().enumerate() {
        match example.class {
            None => refuse(&mut refused, "no_class"),
            Some(class) if class as usize >= labels => refuse(&mut refused, "class_is_no_label_of_the_model"),
            Some(_) if example.input_ids.is_empty() => refuse(&mut refused, "empty"),
            Some(_) if example.input_ids.len() > longest => refuse(&mut refused, "longer_than_the_model"),
            Some(class) => used.push((index, example, class)),
        }
    }
    if used.is_empty() {
        return Err(Error::Empty { rows: examples.len(), refused });
    }
    let lengths: Vec<usize> = used.iter().map(|(_, example, _)| example.input_ids.len()).collect();
    let pad = model.config().pad_id.filter(|id| (*id as usize) < model.config().vocab).unwrap_or(0);
    let mut predictions = vec![None; examples.len()];
    let mut confusion = vec![vec![0; labels]; labels];
    let mut done = 0;
    for batch in batches(model, &lengths, options)? {
        let members: Vec<_> = batch.iter().filter_map(|i| used.get(*i)).collect();
        let rows: Vec<Vec<u32>> = members.iter().map(|(_, example, _)| example.input_ids.clone()).collect();
        let mut input = TokenBatch::padded(&rows, pad)?;
        input.token_types = options.separator.map(|separator| segment_types(&input, separator));
        let scores = model.forward(&input, &Flow::eval())?;
        let scores: Vec<Vec<f32>> = scores.to_dtype(DType::F32)?.to_vec2()?;
        for ((index, _, class), scores) in members.iter().zip(scores) {
            let predicted = best(*index, &scores)?;
            if let Some(slot) = predictions.get_mut(*index) {
                *slot = Some(predicted as u32);
            }
            if let Some(count) = confusion.get_mut(*class as usize).and_then(|row| row.get_mut(predicted)) {
                *count += 1;
            }
        }
        done += batch.len();
        progress(done, used.len());
    }
    Ok(Classification {
        used: used.len(),
        refused,
        accuracy: metrics::accuracy(&confusion),
        macro_f1: metrics::macro_f1(&confusion),
        mcc: metrics::mcc(&confusion),
        labels: model.config().label_names().filter(|names| names.len() == labels),
        classes: metrics::class_scores(&confusion),
        confusion,
        predictions,
    })
}

/// 1 for tokens behind a row's first separator, 0 for the others.
fn segment_types(input: &TokenBatch, separator: u32) -> Vec<u32> {
    let types = |row: &[u32]| {
        let first = row.iter().position(|id| *id == separator).unwrap_or(row.len());
        (0..row.len()).map(move |i| u32::from(i > first)).collect::<Vec<_>>()
    };
    input.ids.chunks(input.length.max(1)).flat_map(types).collect()
}

/// The first of the largest scores.
fn best(index: usize, scores: &[f32]) -> Result<usize> {
    if let Some((label, score)) = scores.iter().enumerate().find(|(_, x)| x.is_nan()) {
        return Err(Error::Example { index, message: format!("label {label} has the score {score}") });
    }
    let mut best = (0, f32::NEG_INFINITY);
    for (label, score) in scores.iter().enumerate() {
        if *score > best.1 {
            best = (label, *score);
        }
    }
    Ok(best.0)
}
