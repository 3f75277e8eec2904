//! What travels beside the activations in one forward pass.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use rand::RngCore;

use crate::{Result, random};

/// Signals of one forward pass, read-only while it runs. A new routing signal is a new field here, not a new argument
/// everywhere.
#[derive(Debug, Clone, Default)]
pub struct Flow {
    /// Training (dropout on) or evaluation.
    pub train: bool,
    /// Key of this pass's random numbers; the same key gives the same masks, so that a block can be run again.
    pub random_key: u64,
    /// Which of the adapters in the slots each sequence of the batch goes through, where
    /// [`activate_by_row`](crate::AdapterSet::activate_by_row) put several there.
    pub rows: Option<Arc<[usize]>>,
    /// The rank that nested products are cut to in this pass, where one was drawn.
    pub nested: Option<Nested>,
}

/// A rank drawn for one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nested {
    /// Components that take part.
    pub rank: usize,
    /// Whether only the last of them is trained.
    pub last_only: bool,
}

impl Flow {
    /// Evaluation: no randomness.
    pub fn eval() -> Self {
        Self::default()
    }

    /// Evaluation of a batch whose sequences go through different adapters: `rows` names each one's.
    pub fn by_row(rows: impl Into<Arc<[usize]>>) -> Self {
        Self { rows: Some(rows.into()), ..Self::default() }
    }

    /// Training with the random numbers of `(seed, step, part)`, where `part` counts the micro-batches of a step.
    pub fn train(seed: u64, step: u64, part: u64) -> Self {
        Self { train: true, random_key: random::mix(&[seed, step, part]), ..Self::default() }
    }

    /// `x` after dropout, where there is any: None in evaluation or at `p = 0`, so that fused products may be taken.
    ///
    /// # Errors
    /// As [`Self::dropout`].
    pub fn dropped(&self, x: &Tensor, p: f64, name: &str) -> Result<Option<Tensor>> {
        (self.train && p > 0.0).then(|| self.dropout(x, p, name)).transpose()
    }

    /// Inverted dropout of `x` with probability `p`, from the stream of `name`. Identity in evaluation or at `p = 0`.
    ///
    /// # Errors
    /// If the mask cannot be made on the device.
    pub fn dropout(&self, x: &Tensor, p: f64, name: &str) -> Result<Tensor> {
        if !self.train || p <= 0.0 {
            return Ok(x.clone());
        }
        let mut rng = random::stream(self.random_key, name);
        let keep = 1.0 - p;
        let threshold = (keep * f64::from(u32::MAX)) as u32;
        let scale = (1.0 / keep) as f32;
        let mask: Vec<f32> =
            (0..x.elem_count()).map(|_| if rng.next_u32() <= threshold { scale } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, x.shape(), x.device())?;
        let mask = if x.dtype() == DType::F32 { mask } else { mask.to_dtype(x.dtype())? };
        Ok(x.mul(&mask)?)
    }
}
