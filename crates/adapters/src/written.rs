//! Weights with everything that acts on them written in, made row after row: what a merged file holds, without a merged matrix
//! in memory.
//!
//! The rows of the base come from the caller, who may take them from a file; those of the change come from the module's slot
//! ([`Adapter::rows`]).

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;

use crate::adapter::Adapter;
use crate::attach::merged_weight;
use crate::module::{Embedding, Linear};
use crate::{Error, Result};

/// Values that are worked on at once.
const CHUNK: usize = 1 << 16;

/// Gives rows of a weight as the base has them: in its dtype, or in f32 where it is quantised.
pub type BaseRows<'a> = dyn FnMut(Range<usize>) -> Result<Tensor> + 'a;

/// Takes rows [n, width], one run after the other.
pub type Take<'a> = dyn FnMut(Range<usize>, &Tensor) -> Result<()> + 'a;

/// Runs of rows of `width` values, that a matrix of `rows` is worked on in.
pub fn runs(rows: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (CHUNK / width.max(1)).max(1);
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

/// Why a change has no place in a weight.
pub(crate) fn no_weight(path: &str) -> Error {
    Error::unsupported(
        format!("merging the adapter of {path}"),
        "its change depends on the input, so it is not a weight; keep it beside the base",
    )
}

/// The weight [d_out, d_in] of a map; in the base's dtype, or in `dtype` where the base is quantised. A change that has no form by
/// rows is made as a whole.
///
/// # Errors
/// If the change depends on the input, or `base` or `take` fails.
pub fn linear(linear: &Linear, base: &mut BaseRows<'_>, dtype: DType, take: &mut Take<'_>) -> Result<()> {
    let (d_out, d_in) = linear.base().dims();
    let Some(adapter) = linear.adapter() else {
        return runs(d_out, d_in).try_for_each(|run| take(run.clone(), &base(run)?));
    };
    let mut merged = |run: Range<usize>, part: &Arc<dyn Adapter>| -> Result<()> {
        let own = Arc::new(FrozenWeight::dense(base(run.clone())?)?);
        let Some(delta) = part.delta(&own)? else { return Err(no_weight(linear.path())) };
        let weight = merged_weight(&own, &delta, dtype)?;
        take(run, &weight.rows(0..weight.d_out())?)
    };
    if adapter.rows(0..1)?.is_none() {
        return merged(0..d_out, adapter);
    }
    for run in runs(d_out, d_in) {
        let Some(part) = adapter.rows(run.clone())? else { return Err(no_weight(linear.path())) };
        merged(run, &part)?;
    }
    Ok(())
}

/// A token table [vocabulary, width], in its own dtype.
///
/// # Errors
/// If the adapter is no low-rank product, or `base` or `take` fails.
pub fn table(embedding: &Embedding, base: &mut BaseRows<'_>, take: &mut Take<'_>) -> Result<()> {
    let (rows, width) = embedding.base().dims();
    runs(rows, width).try_for_each(|run| {
        let own = if embedding.weight().trained().is_some() { None } else { Some(base(run.clone())?) };
        take(run.clone(), &embedding.effective_rows(run, own)?)
    })
}

/// The output head [vocabulary, width] of a tied model, where what acts made it another than its table; `base` gives the rows of
/// the head before that.
///
/// # Errors
/// As [`table`].
pub fn head(embedding: &Embedding, base: &mut BaseRows<'_>, take: &mut Take<'_>) -> Result<()> {
    let (rows, width) = embedding.base().dims();
    runs(rows, width).try_for_each(|run| {
        let own = if embedding.head().is_replaced(embedding) { None } else { Some(base(run.clone())?) };
        take(run.clone(), &embedding.head().effective_rows(embedding, run, own)?)
    })
}
