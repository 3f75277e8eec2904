//! Raw scores of token rows: the parity probe.

use candle_core::{DType, Tensor};
use espalier_adapters::Flow;
use espalier_models::{Model, TokenBatch};

use crate::{Error, Result};

/// Scores of `ids`, one list of token ids a row, in f32: [b, t, vocabulary], or [b, labels] of a classifier. Shorter rows
/// are padded on the right; scores behind their end mean nothing.
///
/// # Errors
/// If there is no row, a row is empty, or the rows do not fit the model.
pub fn logits(model: &Model, ids: &[Vec<u32>]) -> Result<Tensor> {
    if let Some(index) = ids.iter().position(Vec::is_empty) {
        return Err(Error::Example { index, message: "the row has no token".into() });
    }
    if ids.is_empty() {
        return Err(Error::Empty { rows: 0, refused: Default::default() });
    }
    let pad = model.config().pad_id.filter(|id| (*id as usize) < model.config().vocab).unwrap_or(0);
    let scores = model.forward(&TokenBatch::padded(ids, pad)?, &Flow::eval())?;
    Ok(scores.to_dtype(DType::F32)?)
}
