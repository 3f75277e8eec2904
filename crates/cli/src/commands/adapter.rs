//! `espalier adapter`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use espalier_adapters::formats::{check, folder};
use serde::Serialize;

use super::model_args::ModelArgs;
use crate::output::{Output, bytes, count};

/// Judges adapter files, and cuts nested ones.
#[derive(Debug, Args)]
pub(crate) struct Adapter {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what an adapter is and what is wrong with it; with a base, attach it as well. Exit code 1 on any fault.
    Check(Check),
    /// Write the first components of a nested adapter (method dylora) as a plain one that PEFT reads.
    Cut(Cut),
}

#[derive(Debug, Args)]
struct Cut {
    /// Folder of the adapter.
    path: PathBuf,
    /// Folder of the new one.
    out: PathBuf,
    /// Components to keep.
    #[arg(long)]
    rank: usize,
    /// Base it was trained on: model folder, .gguf file or hub id; the embedded seedling if absent.
    #[arg(long, default_value = "")]
    model: String,
    /// Use it although it was made for another base.
    #[arg(long)]
    allow_base: bool,
}

/// What a cut wrote.
#[derive(Debug, Serialize)]
struct Written {
    path: PathBuf,
    rank: usize,
    tensors: usize,
    bytes: u64,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, tensors) = (self.rank, self.tensors);
        write!(f, "{}: rank {rank}, {tensors} tensors, {}", self.path.display(), bytes(self.bytes))
    }
}

#[derive(Debug, Args)]
struct Check {
    /// Folder or file of the adapter.
    path: PathBuf,
    /// Base to attach it to: model folder, .gguf file or hub id.
    #[arg(long)]
    model: Option<String>,
    /// Scaling numerator, for layouts that hold none (loralib).
    #[arg(long)]
    alpha: Option<f64>,
    /// Attach it although it was made for another base.
    #[arg(long, requires = "model")]
    allow_base: bool,
}

/// How it went on a base.
#[derive(Debug, Serialize)]
struct OnBase {
    base: String,
    modules: usize,
    whole: usize,
    token_rows: usize,
    parameters: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    files: check::Report,
    on_base: Option<OnBase>,
    ok: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.files;
        writeln!(f, "{}: {}", r.path.display(), r.form)?;
        if !r.tool.is_empty() {
            writeln!(f, "  written by   {}", r.tool)?;
        }
        if let Some(method) = &r.method {
            let ranks: Vec<String> = r.ranks.iter().map(|(rank, n)| format!("{rank} ({n})")).collect();
            writeln!(f, "  method       {method}, {} modules, rank {}", r.sites, ranks.join(", "))?;
        }
        writeln!(f, "  files        {} tensors, {} values, {}", r.tensors, count(r.values), bytes(r.bytes))?;
        if let Some(on) = &self.on_base {
            writeln!(
                f,
                "  attached to  {}: {} modules, {} tensors whole, {} token rows, {} values",
                on.base,
                on.modules,
                on.whole,
                on.token_rows,
                count(on.parameters)
            )?;
        }
        r.notes.iter().try_for_each(|note| writeln!(f, "  note: {note}"))?;
        r.faults.iter().try_for_each(|fault| writeln!(f, "  fault: {fault}"))?;
        write!(f, "  {}", if self.ok { "no fault found" } else { "not fit for use" })
    }
}

impl Adapter {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        match self.command {
            Command::Check(check) => check.run(out),
            Command::Cut(cut) => cut.run(out),
        }
    }
}

impl Cut {
    fn run(self, out: Output) -> Result<()> {
        let args = ModelArgs::of(&self.model, &self.path.display().to_string(), None, self.allow_base);
        let mut loaded = args.load(out)?;
        let name = loaded.adapters.names().next().unwrap_or_default().to_owned();
        let saved = folder::save_cut(&mut loaded.model, loaded.adapters.get(&name)?, self.rank, &self.out)?;
        out.result(&Written { path: self.out, rank: self.rank, tensors: saved.tensors, bytes: saved.bytes })
    }
}

impl Check {
    fn run(self, out: Output) -> Result<()> {
        let mut files = check::check(&self.path, self.alpha);
        let mut on_base = None;
        if files.faults.is_empty()
            && let Some(base) = &self.model
        {
            match self.attach(base, out) {
                Ok(found) => on_base = Some(found),
                Err(error) => files.faults.push(format!("on {base}: {error:#}")),
            }
        }
        let faults = files.faults.len();
        out.result(&Report { files, on_base, ok: faults == 0 })?;
        if faults > 0 {
            bail!("{}: {faults} {}", self.path.display(), if faults == 1 { "fault" } else { "faults" });
        }
        Ok(())
    }

    fn attach(&self, base: &str, out: Output) -> Result<OnBase> {
        let args = ModelArgs::of(base, &self.path.display().to_string(), self.alpha, self.allow_base);
        let loaded = args.load(out)?;
        let name = loaded.adapters.names().next().unwrap_or_default().to_owned();
        let attached = loaded.adapters.get(&name)?;
        Ok(OnBase {
            base: base.to_owned(),
            modules: attached.layers.len(),
            whole: attached.dense.len(),
            token_rows: attached.rows.iter().map(|(_, rows)| rows.indices.len()).sum(),
            parameters: attached.parameters.trainable_count(),
        })
    }
}
