//! `espalier merge-into-base`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use espalier_models::Quantization;
use espalier_models::export::ExportOptions;
use espalier_train::gain::{Gain, GainOptions};
use espalier_train::merge::{self, MergeReport, WriteOptions};
use serde::Serialize;

use super::model_args::ModelArgs;
use super::probe::ProbeArgs;
use crate::output::{Output, bytes};

/// Writes adapters into the weights of their base and saves the result as a Hugging Face model folder.
///
/// Weights go from file to file, so that a model larger than the memory can be merged. The folder is read back, part by part,
/// and its scores on a probe are compared with those of the adapted model; where they differ by more than the limit, nothing is
/// left. A folder that holds anything but an earlier result is not touched.
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
    /// Measure what the merge keeps of the adapters' gain when its matrices are stored as nf4, nf4-double, int8, q8_0, q6_k, q5_0,
    /// q4_0 or q4_k; several with commas. The gain is that on the labelled rows of --probe.
    #[arg(long, value_name = "STORAGE", value_delimiter = ',')]
    requantize: Vec<String>,
    /// Smallest share of the gain that must be kept in each of these storages, else nothing is left.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, requires = "requantize")]
    least_gain: f64,
    /// Write the merge although a storage keeps less.
    #[arg(long, requires = "requantize")]
    accept_loss: bool,
}

/// A storage by its name.
fn storage(name: &str) -> Result<(String, Quantization)> {
    match espalier_train::setup::quantization(name)? {
        Some(quantization) => Ok((name.to_owned(), quantization)),
        None => bail!("--requantize {name}: that is no quantised storage"),
    }
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
        for (name, value) in m.gain.iter().flat_map(Gain::facts) {
            writeln!(f, "  {}: {value}", name.to_lowercase())?;
        }
        super::probe::figures(f, "the files against the adapted model", &m.written.comparison, &m.written.probe)?;
        super::probe::memory(f, m.written.memory)
    }
}

impl MergeIntoBase {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        if self.model.adapter.is_empty() {
            bail!("nothing to merge: give --adapter DIR");
        }
        let storages = self.requantize.iter().map(|name| storage(name)).collect::<Result<Vec<_>>>()?;
        let mut opened = self.model.open(out)?;
        let dtype = match self.save_dtype.as_deref() {
            None => None,
            Some(name) => Some(espalier_train::setup::dtype(name, &opened.options.device)?),
        };
        let shard_bytes = (self.shard_gib * f64::from(1 << 30)) as u64;
        let export = ExportOptions { dtype, shard_bytes, ..ExportOptions::default() };
        let probe = self.probe.probe(&opened)?;
        let gain = GainOptions { storages, least: self.least_gain, accept: self.accept_loss };
        let options = WriteOptions {
            limit: self.probe.limit(opened.options.dtype, &export),
            export,
            tokenizer: self.model.tokenizer.as_ref().map(PathBuf::from),
            gain: (!self.requantize.is_empty()).then_some(gain),
            base: self.model.base_name(opened.model.provenance().path()),
            command: super::train::command_line(),
            ..WriteOptions::new(&opened.options)
        };
        let merge = merge::merge_into_folder(&mut opened.model, &opened.adapters, &self.out, &options, &probe)?;
        out.result(&Merged { path: self.out, merge })
    }
}
