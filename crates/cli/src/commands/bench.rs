//! `espalier bench`.

use std::fmt;

use anyhow::Result;
use clap::{Args, Subcommand};
use espalier_train::bench::{self, GenerateReport, Shape, TrainReport};
use serde::Serialize;

use crate::output::Output;

/// Measures a training step, or generation, on random weights and tokens.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time of a training step.
    Train(TrainBench),
    /// Tokens a second of prefill and decode.
    Generate(GenerateBench),
}

#[derive(Debug, Args)]
struct ShapeArgs {
    /// Width.
    #[arg(long, default_value_t = 512)]
    hidden: usize,
    /// Blocks.
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Key and value heads.
    #[arg(long, default_value_t = 8)]
    kv_heads: usize,
    /// Width of the MLP.
    #[arg(long, default_value_t = 1408)]
    ff: usize,
    /// Tokens known.
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// Rank of the adapter on all projections.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Method of the adapter.
    #[arg(long, default_value = "lora")]
    method: String,
    /// Keys of its adapter table beside rank and alpha, as TOML: 'target_modules = ["q_proj"]'.
    #[arg(long, default_value = "")]
    adapter: String,
    /// Keys of the dynamics table, as TOML: 'method = "lora-pro"'.
    #[arg(long, default_value = "")]
    dynamics: String,
    /// The same as --method dora.
    #[arg(long)]
    dora: bool,
    /// Device: cpu, cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// float32 or bfloat16 (or f32, bf16, f16).
    #[arg(long, default_value = "float32")]
    dtype: String,
}

impl ShapeArgs {
    fn shape(&self) -> Shape {
        let dtype = match self.dtype.as_str() {
            "float32" => "f32",
            "bfloat16" => "bf16",
            "float16" => "f16",
            other => other,
        };
        Shape {
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            ff: self.ff,
            vocab: self.vocab,
            rank: self.rank,
            method: if self.dora { "dora".into() } else { self.method.clone() },
            adapter: self.adapter.clone(),
            dynamics: self.dynamics.clone(),
            device: self.device.clone(),
            dtype: dtype.into(),
        }
    }
}

#[derive(Debug, Args)]
struct TrainBench {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Rows.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a row.
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Timed steps.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Steps before them.
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// Recompute blocks in the backward pass.
    #[arg(long)]
    checkpointing: bool,
}

#[derive(Debug, Args)]
struct GenerateBench {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Batch sizes.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32])]
    batches: Vec<usize>,
    /// Adapters that the rows of a batch go through in turn.
    #[arg(long, default_value_t = 1)]
    adapters: usize,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 64)]
    prompt: usize,
    /// New tokens.
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Step(TrainReport);

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.0;
        write!(
            f,
            "{} {} {}: {:.0} tokens/s, {:.4} s a step ({:.4} to {:.4}), peak {} MiB, first step after {:.2} s, {:.0} % of the floor ({:.0} GFLOP at {:.0} GFLOP/s)",
            r.method,
            r.device,
            r.dtype,
            r.tokens_per_s,
            r.step_s,
            r.min_s,
            r.max_s,
            r.peak_mib,
            r.first_step_s,
            100.0 * r.share_of_floor,
            r.step_gflop,
            r.matrix_gflops
        )
    }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Speeds(Vec<GenerateReport>);

impl fmt::Display for Speeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|r| {
            writeln!(
                f,
                "batch {:3}: prefill {:.0} tokens/s, decode {:.0} tokens/s",
                r.batch, r.prefill_tokens_per_s, r.decode_tokens_per_s
            )
        })
    }
}

impl Bench {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        match self.what {
            What::Train(b) => {
                let report = bench::train(&b.shape.shape(), (b.batch, b.seq), (b.warmup, b.steps), b.checkpointing)?;
                out.result(&Step(report))
            }
            What::Generate(b) => {
                let shape = b.shape.shape();
                let one = |batch: &usize| Ok(bench::generate(&shape, *batch, (b.prompt, b.new_tokens), b.adapters)?);
                out.result(&Speeds(b.batches.iter().map(one).collect::<Result<_>>()?))
            }
        }
    }
}
