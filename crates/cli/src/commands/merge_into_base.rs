//! `espalier merge-into-base`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use espalier_models::export::ExportOptions;
use espalier_train::merge::{self, MergeReport, WriteOptions};
use serde::Serialize;

use super::model_args::ModelArgs;
use super::probe::ProbeArgs;
use crate::output::{Output, bytes};

/// Writes adapters into the weights of their base and saves the result as a Hugging Face model folder.
///
/// The folder is read back and its scores on a probe are compared with those of the adapted model; where they differ by more
/// than the limit, nothing is left. A folder that holds anything but an earlier result is not touched.
#[derive(Debug, Args)]
pub(crate) struct MergeIntoBase {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder to write: new, empty, or an earlier result.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the files: f32, bf16, f16; as the model is loaded if absent.
    #[arg(long)]
    save_dtype: Option<String>,
    /// Largest shard in GiB.
    #[arg(long, default_value_t = 5.0)]
    shard_gib: f64,
    #[command(flatten)]
    probe: ProbeArgs,
}

#[derive(Debug, Serialize)]
struct Merged {
    path: PathBuf,
    #[serde(flatten)]
    merge: MergeReport,
}

impl fmt::Display for Merged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &self.merge;
        writeln!(
            f,
            "{}: {} modules merged, {} tensors in {} files ({})",
            self.path.display(),
            m.modules,
            m.written.tensors,
            m.written.files,
            bytes(m.written.bytes)
        )?;
        writeln!(f, "  adapted against base: largest difference of scores {:.2e}", m.adapter_effect)?;
        super::probe::figures(f, "the files against the adapted model", &m.written.comparison, &m.written.probe)
    }
}

impl MergeIntoBase {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        if self.model.adapter.is_empty() {
            bail!("nothing to merge: give --adapter DIR");
        }
        let mut loaded = self.model.load(out)?;
        let dtype = match self.save_dtype.as_deref() {
            None => None,
            Some(name) => Some(espalier_train::setup::dtype(name, loaded.model.device())?),
        };
        let shard_bytes = (self.shard_gib * f64::from(1 << 30)) as u64;
        let export = ExportOptions { dtype, shard_bytes, ..ExportOptions::default() };
        let probe = self.probe.probe(&loaded)?;
        let options = WriteOptions {
            limit: self.probe.limit(&loaded.model, &export),
            export,
            tokenizer: self.model.tokenizer.as_ref().map(PathBuf::from),
            base: self.model.base_name(&loaded.model),
            command: super::train::command_line(),
        };
        let merge = merge::merge_into_folder(&mut loaded.model, &mut loaded.adapters, &self.out, &options, &probe)?;
        out.result(&Merged { path: self.out, merge })
    }
}
