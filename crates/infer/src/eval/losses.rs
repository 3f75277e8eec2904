//! Negative log-likelihoods of chosen tokens; only the positions that predict them go through the head.
//!
//! Equation: loss(t) = -ln p(x_t | x_0 .. x_(t-1)), from the finished vector at t - 1
//! Shapes:   vectors [b, t, hidden] -> [n, hidden] -> scores [n, vocabulary] in pieces of bounded size

use candle_core::{DType, Tensor};
use espalier_adapters::Flow;
use espalier_kernels::cross_entropy::cross_entropy;
use espalier_models::{Model, TokenBatch};

use crate::{Error, Result};

/// Most scores held at once.
const SCORES: usize = 1 << 24;

/// A token whose likelihood is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    /// Row of the batch.
    pub(crate) row: usize,
    /// Its place in the row, at least 1.
    pub(crate) place: usize,
    /// Its id.
    pub(crate) id: u32,
}

/// Loss in nats of each target, in their order; all are finite. Rows must not be empty.
pub(crate) fn token_losses(model: &Model, rows: &[Vec<u32>], targets: &[Target]) -> Result<Vec<f64>> {
    if targets.is_empty() {
        return Ok(Vec::new());
    }
    let flow = Flow::eval();
    let hidden = model.hidden(&TokenBatch::padded(rows, 0)?, &flow)?;
    let (b, t, h) = hidden.dims3()?;
    let hidden = hidden.reshape((b * t, h))?;
    let mut losses = Vec::with_capacity(targets.len());
    for part in targets.chunks((SCORES / model.config().vocab.max(1)).max(1)) {
        let places: Vec<u32> = part.iter().map(|x| (x.row * t + x.place.saturating_sub(1)) as u32).collect();
        let labels: Vec<u32> = part.iter().map(|x| x.id).collect();
        let vectors = hidden.index_select(&Tensor::new(places, hidden.device())?, 0)?;
        let found = cross_entropy(&model.scores(&vectors, &flow)?, &labels, None)?;
        let found = found.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        if let Some((target, loss)) = part.iter().zip(&found).find(|(_, loss)| !loss.is_finite()) {
            return Err(Error::Scores(format!("token {} at place {} has the loss {loss}", target.id, target.place)));
        }
        losses.extend(found);
    }
    Ok(losses)
}
