//! A saved adapter read back: its folder must give the logits of the run, bit for bit where the saved factors are the trained
//! ones.

use std::path::Path;

use candle_core::{DType, Tensor};
use espalier_adapters::Flow;
use espalier_adapters::formats::folder;
use espalier_models::{Model, TokenBatch};
use serde::Serialize;

use crate::trainer::Run;
use crate::{Error, Result};

/// How a saved adapter, read back, compares with the one in memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reload {
    /// Tokens of the probe batch.
    pub probe_tokens: usize,
    /// Largest difference of logits.
    pub max_difference: f64,
    /// Largest difference that is allowed; 0 asks for equal bits.
    pub limit: f64,
}

impl std::fmt::Display for Reload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.max_difference == 0.0 {
            true => write!(f, "same logits bit for bit on {} probe tokens", self.probe_tokens),
            false => write!(
                f,
                "logits within {:.1e} on {} probe tokens (limit {:.1e})",
                self.max_difference, self.probe_tokens, self.limit
            ),
        }
    }
}

/// Name of the adapter while it is compared.
const NAME: &str = "read back";
/// Rows of the training data and tokens of each that are probed.
const PROBE: (usize, usize) = (2, 32);

/// The beginnings of the first training rows, and one row of the trained tokens where there are some.
fn probe(run: &Run) -> Result<TokenBatch> {
    let batch = run.data.train.batch(0, 0)?;
    let rows: Vec<&[u32]> = (0..batch.rows.min(PROBE.0))
        .map(|row| {
            let at = row * batch.cols..(row + 1) * batch.cols;
            let used = batch.segments[at.clone()].iter().take_while(|s| **s != espalier_data::PADDING).count();
            &batch.ids[at][..used]
        })
        .collect();
    let length = rows.iter().map(|row| row.len()).min().unwrap_or(0).min(PROBE.1);
    let mut ids: Vec<u32> = rows.iter().flat_map(|row| row[..length].iter().copied()).collect();
    for (_, tokens) in &run.adapters.get(&run.name)?.rows {
        ids.extend(tokens.indices.iter().cycle().take(length));
    }
    let rows = ids.len() / length.max(1);
    Ok(TokenBatch::new(ids, rows, length)?)
}

/// Logits of `input`, one after the other, in f32.
fn logits(model: &Model, input: &TokenBatch) -> Result<Vec<f32>> {
    let scores: Tensor = model.forward(input, &Flow::eval())?.detach();
    Ok(scores.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// Largest difference; infinite where one is no number or they are not of one length.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    let larger = |m: f64, d: f64| if d >= 0.0 { m.max(d) } else { f64::INFINITY };
    let worst = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, larger);
    if a.len() == b.len() { worst } else { f64::INFINITY }
}

/// Reads the adapter in `path` back onto the run's model, and compares the logits of a probe batch with those of the trained
/// adapter, which acts again afterwards.
///
/// On the CPU they must be equal bit for bit; where the method is saved in another form than it is trained in (a start that
/// moves a part of the base into the adapter), and on other devices, within the rounding of the model's dtype, relative to
/// the largest logit: 1e-4 in f32.
///
/// # Errors
/// If the folder cannot be read, does not fit, or gives other logits.
pub fn check(run: &mut Run, path: &Path) -> Result<Reload> {
    let input = probe(run)?;
    let trained = logits(&run.model, &input)?;
    let device = run.model.device().clone();
    let attached = folder::load(&mut run.model, folder::read(path)?, false, DType::F32, &device)?;
    run.adapters.add(NAME, attached)?;
    let saved = run
        .adapters
        .activate(&mut run.model, &[(NAME, 1.0)])
        .map_err(Error::from)
        .and_then(|()| logits(&run.model, &input));
    run.adapters.activate(&mut run.model, &[(&run.name, 1.0)])?;
    run.adapters.remove(&mut run.model, NAME)?;
    let saved = saved?;
    let same_form = run.adapters.get(&run.name)?.config.method.portable().is_none();
    let limit = match run.model.dtype() {
        _ if same_form && device.is_cpu() => 0.0,
        DType::BF16 => 6e-2,
        DType::F16 => 8e-3,
        _ => 1e-4,
    };
    let limit = limit * trained.iter().fold(1.0, |m: f64, v| m.max(f64::from(v.abs())));
    let found = Reload { probe_tokens: input.ids.len(), max_difference: difference(&trained, &saved), limit };
    if found.max_difference > limit {
        let message = format!(
            "the adapter read back gives other logits than the trained one: they differ by {:.3e}, at most {limit:.1e} is \
             allowed; do not use it",
            found.max_difference
        );
        return Err(Error::run(path, message));
    }
    Ok(found)
}
