//! `espalier logits`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use candle_core::{DType, Device};
use clap::Args;
use espalier_adapters::formats::safetensors;
use espalier_infer::probe;
use serde::Serialize;

use super::model_args::ModelArgs;
use crate::output::Output;

/// Scores of token ids: reads `ids` [b, t] (int64), writes `logits` [b, t, vocabulary] or [b, labels] (f32).
#[derive(Debug, Args)]
pub(crate) struct Logits {
    #[command(flatten)]
    model: ModelArgs,
    /// Safetensors file with `ids`.
    #[arg(long)]
    ids: PathBuf,
    /// Safetensors file to write.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Serialize)]
struct Written {
    path: PathBuf,
    shape: Vec<usize>,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: logits {:?}", self.path.display(), self.shape)
    }
}

impl Logits {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let file = safetensors::TensorFile::open(&self.ids)?;
        let ids = file.load("ids", &Device::Cpu)?;
        if ids.rank() != 2 {
            bail!("{}: `ids` must be [b, t], is {:?}", self.ids.display(), ids.dims());
        }
        let rows = ids.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let rows = rows
            .into_iter()
            .map(|row| row.into_iter().map(u32::try_from).collect::<Result<Vec<u32>, _>>())
            .collect::<Result<Vec<_>, _>>()?;
        let loaded = self.model.load(out)?;
        let logits = probe::logits(&loaded.model, &rows)?.to_dtype(DType::F32)?;
        let shape = logits.dims().to_vec();
        safetensors::write(&self.out, vec![safetensors::Entry::of("logits", &logits)], &BTreeMap::new())?;
        out.result(&Written { path: self.out, shape })
    }
}
