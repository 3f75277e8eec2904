//! Sequence classification.
//!
//! Equation: L = - sum_rows log p(class | row) / number of rows of the step
//! Shapes:   one class a row, read from the row's first token
//! Source:   transformers' sequence-classification heads
//! Cost:     the head's product for one token a row

use espalier_data::Batch;

use super::{Objective, Targets};
use crate::{Error, Result};

/// Sequence classification into `labels` classes.
#[derive(Debug, Clone, Copy)]
pub struct Classification {
    /// Number of classes.
    pub labels: usize,
    /// Token that ends the first text of a pair, for models that mark the second one.
    pub separator: Option<u32>,
}

impl Objective for Classification {
    fn name(&self) -> &'static str {
        "classification"
    }

    fn targets(&self, batch: &Batch) -> Result<Targets> {
        if batch.classes.len() != batch.rows {
            return Err(Error::recipe("data", "a classifier needs rows with a label"));
        }
        if let Some(class) = batch.classes.iter().find(|c| **c as usize >= self.labels) {
            return Err(Error::recipe("labels", format!("a row has label {class}, the head has {}", self.labels)));
        }
        let places = (0..batch.rows).map(|row| (row * batch.cols) as u32).collect();
        Ok(Targets { places, labels: batch.classes.clone(), separator: self.separator })
    }
}
