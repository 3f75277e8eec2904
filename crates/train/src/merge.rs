//! Merging with a check: scores of a probe batch before and after, and a stop above a limit.

use candle_core::{D, DType, Tensor};
use espalier_adapters::{AdapterSet, Flow, random};
use espalier_kernels::softmax::log_softmax;
use espalier_models::{Model, TokenBatch};
use rand::Rng;
use serde::Serialize;

use crate::{Error, Result};

/// What merging did to the scores of the probe batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeReport {
    /// Modules whose weights changed.
    pub modules: usize,
    /// Whether the output head is no longer the token table.
    pub unties: bool,
    /// Largest difference of scores between adapted and merged model.
    pub max_difference: f64,
    /// Mean loss of the merged model less that of the adapted one, in nats.
    pub loss_difference: f64,
    /// Largest difference of scores between base and adapted model; 0 means that the adapter does nothing.
    pub adapter_effect: f64,
}

/// Rows and tokens of the probe batch.
const PROBE: (usize, usize) = (2, 32);

fn probe(model: &Model) -> Result<TokenBatch> {
    let mut rng = random::stream(0, "merge probe");
    let length = PROBE.1.min(model.config().max_positions);
    let ids = (0..PROBE.0 * length).map(|_| rng.random_range(0..model.config().vocab as u32)).collect();
    Ok(TokenBatch::new(ids, PROBE.0, length)?)
}

fn scores(model: &Model, input: &TokenBatch) -> Result<Tensor> {
    Ok(model.forward(input, &Flow::eval())?.detach().to_dtype(DType::F32)?)
}

/// Largest difference; infinite where one is no number, which the maximum of a tensor passes over.
fn max_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let differences = (a - b)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
    let larger = |m: f64, d: f64| if d >= 0.0 { m.max(d) } else { f64::INFINITY };
    Ok(differences.into_iter().map(f64::from).fold(0.0, larger))
}

/// Mean over all positions of the loss of the token that `reference` likes best.
fn loss(of: &Tensor, reference: &Tensor) -> Result<f64> {
    let best = reference.argmax(D::Minus1)?.unsqueeze(D::Minus1)?;
    Ok(-f64::from(log_softmax(of)?.contiguous()?.gather(&best, of.rank() - 1)?.mean_all()?.to_scalar::<f32>()?))
}

/// Merges the adapters that act into the base; puts the base back and fails if scores differ by more than `limit`, or if
/// the adapter changes nothing.
///
/// # Errors
/// If the adapters cannot be merged, or the result differs.
pub fn merge_and_compare(model: &mut Model, adapters: &mut AdapterSet, limit: f64) -> Result<MergeReport> {
    let input = probe(model)?;
    let active: Vec<(String, f64)> = adapters.active().to_vec();
    let wanted: Vec<(&str, f64)> = active.iter().map(|(n, w)| (n.as_str(), *w)).collect();
    let adapted = scores(model, &input)?;
    adapters.disable(model)?;
    let base = scores(model, &input)?;
    adapters.activate(model, &wanted)?;
    let dtype = model.dtype();
    let merged = adapters.merge(model, dtype)?;
    // A changed table that is no longer the head is compared as it will be saved, with the old head.
    let after = if merged.unties { adapted.clone() } else { scores(model, &input)? };
    let report = MergeReport {
        modules: merged.modules,
        unties: merged.unties,
        max_difference: max_difference(&adapted, &after)?,
        loss_difference: loss(&after, &adapted)? - loss(&adapted, &adapted)?,
        adapter_effect: max_difference(&base, &adapted)?,
    };
    let fault = if report.adapter_effect == 0.0 {
        Some("the adapter changes nothing: its scores equal the base's".to_owned())
    } else if report.max_difference > limit || !report.max_difference.is_finite() {
        Some(format!("scores differ by {:.3e} after merging, more than {limit:.1e}", report.max_difference))
    } else {
        None
    };
    if let Some(message) = fault {
        adapters.unmerge(model, merged)?;
        return Err(Error::recipe("merge", message));
    }
    Ok(report)
}
