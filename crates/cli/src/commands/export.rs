//! `espalier export`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use espalier_adapters::formats::forms;
use espalier_models::export::ExportOptions;
use espalier_train::merge::{self, WriteOptions};
use espalier_train::{export, merge::Written};
use serde::Serialize;

use super::model_args::{ModelArgs, Opened};
use super::probe::ProbeArgs;
use crate::output::Output;

/// Form of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// The adapter as a PEFT folder.
    Peft,
    /// The adapter as a folder of mlx-lm.
    Mlx,
    /// The adapter as a GGUF file of llama.cpp; --out names the file.
    GgufAdapter,
    /// The base without adapters as a Hugging Face folder, dense (from GGUF, NF4, another dtype).
    Model,
}

/// Saves an adapter in another form, the weighted sum of several as one (checked against their base), or a base in another dtype.
#[derive(Debug, Args)]
pub(crate) struct Export {
    #[command(flatten)]
    model: ModelArgs,
    /// Form of the result.
    #[arg(long, value_enum, default_value = "peft")]
    form: Form,
    /// Folder (or file) to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of a model's files: f32, bf16, f16.
    #[arg(long)]
    save_dtype: Option<String>,
    /// Read back what was written and compare its scores; nothing is left where they differ by more than the limit.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    probe: ProbeArgs,
}

#[derive(Debug, Serialize)]
struct Report {
    path: PathBuf,
    tensors: usize,
    bytes: u64,
    #[serde(flatten)]
    verified: Option<Written>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} tensors, {}", self.path.display(), self.tensors, crate::output::bytes(self.bytes))?;
        let Some(written) = &self.verified else { return Ok(()) };
        writeln!(f)?;
        super::probe::figures(
            f,
            "the files against the model they were made from",
            &written.comparison,
            &written.probe,
        )?;
        super::probe::memory(f, written.memory)
    }
}

impl Export {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        if self.probe.is_given() && !self.verify {
            bail!("--probe and --tolerance have no use without --verify");
        }
        let mut opened = self.model.open(out)?;
        let report = match self.form {
            Form::Peft => self.adapter(&mut opened, forms::Form::Peft)?,
            Form::Mlx => self.adapter(&mut opened, forms::Form::Mlx)?,
            Form::GgufAdapter => self.adapter(&mut opened, forms::Form::Gguf)?,
            Form::Model => self.base(&mut opened)?,
        };
        out.result(&report)
    }

    fn options(&self, opened: &Opened, export: ExportOptions) -> WriteOptions {
        WriteOptions {
            limit: self.probe.limit(opened.options.dtype, &export),
            export,
            tokenizer: self.model.tokenizer.as_ref().map(PathBuf::from),
            base: self.model.base_name(opened.model.provenance().path()),
            command: super::train::command_line(),
            ..WriteOptions::new(&opened.options)
        }
    }

    fn report(&self, written: Written) -> Report {
        Report { path: self.out.clone(), tensors: written.tensors, bytes: written.bytes, verified: Some(written) }
    }

    fn adapter(&self, opened: &mut Opened, form: forms::Form) -> Result<Report> {
        if self.save_dtype.is_some() {
            bail!("--save-dtype is for models; adapters are written in f32");
        }
        if self.verify {
            let probe = self.probe.probe(opened)?;
            let options = self.options(opened, ExportOptions::default());
            let Opened { model, adapters, .. } = opened;
            return Ok(self.report(export::adapter_verified(model, adapters, form, &self.out, &options, &probe)?));
        }
        let saved = export::adapter(&mut opened.model, &opened.adapters, form, &self.out)?;
        Ok(Report { path: self.out.clone(), tensors: saved.tensors, bytes: saved.bytes, verified: None })
    }

    fn base(&self, opened: &mut Opened) -> Result<Report> {
        if !self.model.adapter.is_empty() {
            bail!("adapters are not part of this form; use merge-into-base to write them into the weights");
        }
        let dtype = match self.save_dtype.as_deref() {
            None => None,
            Some(name) => Some(espalier_train::setup::dtype(name, &opened.options.device)?),
        };
        let options = self.options(opened, ExportOptions { dtype, ..ExportOptions::default() });
        if self.verify {
            let probe = self.probe.probe(opened)?;
            return Ok(self.report(merge::copy_verified(&mut opened.model, &self.out, &options, &probe)?));
        }
        let exported = merge::copy_into_folder(&mut opened.model, &self.out, &options)?;
        Ok(Report { path: self.out.clone(), tensors: exported.tensors, bytes: exported.bytes, verified: None })
    }
}
