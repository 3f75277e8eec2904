//! `espalier export`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use espalier_adapters::formats::folder;
use espalier_models::export::ExportOptions;
use serde::Serialize;

use super::model_args::ModelArgs;
use crate::output::Output;

/// Form of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// The adapter as a PEFT folder.
    Peft,
    /// The base without adapters as a Hugging Face folder, dense (from GGUF, NF4, another dtype).
    Model,
}

/// Saves an adapter as a PEFT folder (checked against its base), or a base in another dtype.
#[derive(Debug, Args)]
pub(crate) struct Export {
    #[command(flatten)]
    model: ModelArgs,
    /// Form of the result.
    #[arg(long, value_enum, default_value = "peft")]
    form: Form,
    /// Folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of a model's files: f32, bf16, f16.
    #[arg(long)]
    save_dtype: Option<String>,
}

#[derive(Debug, Serialize)]
struct Written {
    path: PathBuf,
    tensors: usize,
    bytes: u64,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} tensors, {}", self.path.display(), self.tensors, crate::output::bytes(self.bytes))
    }
}

impl Export {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let mut loaded = self.model.load()?;
        match self.form {
            Form::Peft => {
                let names: Vec<String> = loaded.adapters.names().map(str::to_owned).collect();
                let [name] = names.as_slice() else {
                    bail!("{} adapters given; exactly one can be written as a PEFT folder", names.len());
                };
                let attached = loaded.adapters.get(name)?;
                let saved = folder::save(&mut loaded.model, attached, &self.out)?;
                out.result(&Written { path: self.out, tensors: saved.tensors, bytes: saved.bytes })
            }
            Form::Model => {
                if !self.model.adapter.is_empty() {
                    bail!("adapters are not part of this form; use merge-into-base to write them into the weights");
                }
                let dtype = match self.save_dtype.as_deref() {
                    None => None,
                    Some(name) => Some(espalier_train::setup::dtype(name, loaded.model.device())?),
                };
                let exported = loaded.model.export(&self.out, &ExportOptions { dtype, ..ExportOptions::default() })?;
                out.result(&Written { path: self.out, tensors: exported.tensors, bytes: exported.bytes })
            }
        }
    }
}
