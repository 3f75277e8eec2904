//! What commands that check what they wrote have in common: the rows to compare on, and the limit.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use clap::Args;
use espalier_data::{DataOptions, EncodeOptions, Source};
use espalier_infer::max_length;
use espalier_models::export::ExportOptions;
use espalier_train::merge::default_limit;
use espalier_train::resident::Peaks;
use espalier_train::verify::{Comparison, Probe};

use super::model_args::Opened;

/// What is compared, and how far apart it may be.
#[derive(Debug, Args)]
pub(crate) struct ProbeArgs {
    /// Data to compare scores on (any form that can be trained on); trained tokens, a text and drawn tokens if absent.
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// Most rows of the data used.
    #[arg(long, default_value_t = 16)]
    probe_rows: usize,
    /// Largest difference of scores; 1e-3, or 0.5 where weights or activations have 16 bits.
    #[arg(long)]
    tolerance: Option<f64>,
}

impl ProbeArgs {
    /// Whether something was asked for that only matters where scores are compared.
    pub(crate) fn is_given(&self) -> bool {
        self.probe.is_some() || self.tolerance.is_some()
    }

    pub(crate) fn limit(&self, dtype: DType, export: &ExportOptions) -> f64 {
        self.tolerance.unwrap_or_else(|| default_limit(dtype, export))
    }

    pub(crate) fn probe(&self, opened: &Opened) -> Result<Probe> {
        let config = opened.model.config();
        let Some(path) = &self.probe else {
            return Ok(Probe::made(config, &opened.codec, &opened.adapters.trained_tokens())?);
        };
        let options = EncodeOptions {
            max_length: Some(max_length(config)),
            label_names: config.label_names(),
            ..EncodeOptions::default()
        };
        let codec = opened.codec.clone().with_options(options);
        let source = Source::open_many(
            std::slice::from_ref(path),
            DataOptions { limit: Some(self.probe_rows), ..DataOptions::default() },
        )?;
        let examples = source
            .rows()
            .enumerate()
            .map(|(i, row)| codec.encode(&row?.1).with_context(|| format!("row {}", i + 1)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Probe::of_examples(config, examples, &path.display().to_string())?)
    }
}

/// The figures of a comparison in two lines.
pub(crate) fn figures(f: &mut fmt::Formatter<'_>, what: &str, c: &Comparison, probe: &str) -> fmt::Result {
    writeln!(
        f,
        "  {what}: largest difference of scores {:.2e}, same best score at {:.2} % of {} positions, mean loss {:+.2e}",
        c.max_difference,
        100.0 * c.top1_agreement,
        c.positions,
        c.loss_difference
    )?;
    write!(f, "  compared on {probe}")
}

/// The most memory that it took, in a line.
pub(crate) fn memory(f: &mut fmt::Formatter<'_>, peaks: Option<Peaks>) -> fmt::Result {
    let Some((name, value)) = peaks.map(|peaks| peaks.fact()) else { return Ok(()) };
    write!(f, "\n  {}: {value}", name.to_lowercase())
}
