//! `espalier merge-into-base`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use candle_core::DType;
use clap::Args;
use espalier_models::export::{ExportOptions, copy_companions};
use espalier_train::merge::{self, MergeReport};
use serde::Serialize;

use super::model_args::ModelArgs;
use crate::output::{Output, bytes};

/// Writes adapters into the weights of their base and saves the result as a Hugging Face model folder.
///
/// Scores of a probe batch are compared before and after; a difference above the limit is an error, and nothing is written.
#[derive(Debug, Args)]
pub(crate) struct MergeIntoBase {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the files: f32, bf16, f16; as the model is loaded if absent.
    #[arg(long)]
    save_dtype: Option<String>,
    /// Largest shard in GiB.
    #[arg(long, default_value_t = 5.0)]
    shard_gib: f64,
    /// Largest difference of scores between adapted and merged model.
    #[arg(long)]
    tolerance: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Written {
    path: PathBuf,
    tensors: usize,
    files: usize,
    bytes: u64,
    #[serde(flatten)]
    merge: MergeReport,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &self.merge;
        writeln!(
            f,
            "{}: {} modules merged, {} tensors in {} files ({})",
            self.path.display(),
            m.modules,
            self.tensors,
            self.files,
            bytes(self.bytes)
        )?;
        write!(
            f,
            "  merged against adapted: largest difference of scores {:.2e}, mean loss {:+.2e}; adapted against base: {:.2e}",
            m.max_difference, m.loss_difference, m.adapter_effect
        )
    }
}

impl MergeIntoBase {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        if self.model.adapter.is_empty() {
            bail!("nothing to merge: give --adapter DIR");
        }
        let mut loaded = self.model.load()?;
        let dtype = match self.save_dtype.as_deref() {
            None => None,
            Some(name) => Some(espalier_train::setup::dtype(name, loaded.model.device())?),
        };
        let limit = self.tolerance.unwrap_or(if loaded.model.dtype() == DType::F32 { 1e-3 } else { 0.5 });
        let report = merge::merge_and_compare(&mut loaded.model, &mut loaded.adapters, limit)?;
        let options = ExportOptions {
            dtype,
            shard_bytes: (self.shard_gib * f64::from(1 << 30)) as u64,
            untie: report.unties,
            ..ExportOptions::default()
        };
        let exported = loaded.model.export(&self.out, &options)?;
        if let Some(tokenizer) = &self.model.tokenizer {
            copy_companions(std::path::Path::new(tokenizer), &self.out)?;
        }
        out.result(&Written {
            path: self.out,
            tensors: exported.tensors,
            files: exported.files,
            bytes: exported.bytes,
            merge: report,
        })
    }
}
