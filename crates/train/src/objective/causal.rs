//! Next-token prediction on the labelled tokens.
//!
//! Equation: L = - sum_i log p(label_{i+1} | tokens up to i) / number of labelled tokens of the step
//! Shapes:   labels [rows, columns], -100 where nothing is learned
//! Source:   transformers' causal language-model loss; weighed by tokens over the whole step
//! Cost:     the head's product for labelled tokens only

use espalier_data::Batch;

use super::{Objective, Targets};
use crate::Result;

/// Next-token prediction.
#[derive(Debug, Clone, Copy, Default)]
pub struct Causal;

impl Objective for Causal {
    fn name(&self) -> &'static str {
        "causal"
    }

    fn targets(&self, batch: &Batch) -> Result<Targets> {
        let mut targets = Targets::default();
        for (row, labels) in batch.labels.chunks(batch.cols.max(1)).enumerate() {
            for (column, label) in labels.iter().enumerate().skip(1) {
                if let Ok(label) = u32::try_from(*label) {
                    targets.places.push((row * batch.cols + column - 1) as u32);
                    targets.labels.push(label);
                }
            }
        }
        Ok(targets)
    }
}
