//! `espalier generate`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use espalier_data::Message;
use espalier_infer::{Completion, GenerateOptions, SamplingConfig, Stats, end_ids, generate, prompt_ids};
use serde::Serialize;

use super::model_args::ModelArgs;
use crate::output::{self, Output};

/// How tokens are chosen.
#[derive(Debug, Clone, Args)]
pub(crate) struct SamplingArgs {
    /// Most new tokens.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Temperature; 0 takes the most likely token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Only the K most likely tokens.
    #[arg(long)]
    top_k: Option<usize>,
    /// Only the most likely tokens that together have this probability.
    #[arg(long)]
    top_p: Option<f32>,
    /// Only tokens at least this likely relative to the most likely one.
    #[arg(long)]
    min_p: Option<f32>,
    /// Divides the scores of tokens that have occurred.
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Text that ends the answer; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Seed of the choices.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on after the end token.
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArgs {
    pub(crate) fn options(&self, eos: Vec<u32>) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            sampling: SamplingConfig {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
            },
            stop: self.stop.clone(),
            eos,
            ignore_eos: self.ignore_eos,
            ..GenerateOptions::default()
        }
    }
}

/// Continues prompts, streaming the text of a single one.
#[derive(Debug, Args)]
pub(crate) struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Prompt; may be given several times.
    #[arg(long, short)]
    prompt: Vec<String>,
    /// File with one prompt a line.
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// Put each prompt into the chat template as a user's message.
    #[arg(long)]
    chat: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    completions: Vec<Completion>,
    stats: Stats,
    tokens_per_s: f64,
    #[serde(skip)]
    streamed: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.streamed {
            return Ok(());
        }
        for (i, completion) in self.completions.iter().enumerate() {
            writeln!(f, "[{i}] {}", completion.text)?;
        }
        Ok(())
    }
}

impl Generate {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let mut prompts = self.prompt.clone();
        if let Some(path) = &self.prompt_file {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            prompts.extend(text.lines().filter(|l| !l.trim().is_empty()).map(str::to_owned));
        }
        if prompts.is_empty() {
            bail!("no prompt: give --prompt TEXT or --prompt-file FILE");
        }
        let loaded = self.model.load(out)?;
        let ids = prompts
            .iter()
            .map(|text| match self.chat {
                true => Ok(loaded.codec.encode_prompt(&[Message::new("user", text.as_str())], None)?),
                false => Ok(prompt_ids(&loaded.codec, text)?),
            })
            .collect::<Result<Vec<_>>>()?;
        let streamed = prompts.len() == 1 && !out.is_json();
        let options = self.sampling.options(end_ids(&loaded.model, &loaded.codec));
        if streamed && !self.chat {
            output::piece(&prompts[0])?;
        }
        let mut failure = None;
        let generated = generate(&loaded.model, &loaded.codec, &ids, &options, &mut |event| {
            if streamed && failure.is_none() {
                failure = output::piece(&event.text).err();
            }
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        let stats = generated.stats;
        let tokens_per_s = stats.decode_tokens as f64 / stats.decode_s.max(1e-9);
        if streamed {
            output::piece("\n")?;
        }
        out.message(format!("{} tokens, {tokens_per_s:.0} tokens/s", stats.decode_tokens));
        let report = Report { completions: generated.completions, stats, tokens_per_s, streamed };
        if streamed { Ok(()) } else { out.result(&report) }
    }
}
