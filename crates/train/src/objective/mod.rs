//! What is learned from: an objective says which positions of a batch are scored against which targets. Scoring, its
//! gradient and the division by the weight of the whole step are the trainer's.

pub mod causal;
pub mod classification;

use espalier_data::Batch;

use crate::Result;

/// Positions of a batch and what their scores should say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    /// Places in the flattened batch [rows * columns], each at most once.
    pub places: Vec<u32>,
    /// The right token or label of each.
    pub labels: Vec<u32>,
    /// Token that ends the first text of a pair, for models that mark the second one.
    pub separator: Option<u32>,
}

impl Targets {
    /// How much this batch weighs in its step: the number of targets.
    pub fn weight(&self) -> usize {
        self.labels.len()
    }
}

/// Something to learn from a batch.
pub trait Objective: Send + Sync + std::fmt::Debug {
    /// Name in metrics.
    fn name(&self) -> &'static str;

    /// The targets of a batch.
    ///
    /// # Errors
    /// If the batch lacks what the objective needs.
    fn targets(&self, batch: &Batch) -> Result<Targets>;
}
