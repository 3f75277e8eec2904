//! Batched generation with a cache of keys and values.
//!
//! Prompts of a batch are padded on the left, so that all of them end at the same place; padding is a segment of its own,
//! which nothing sees, and positions count from each prompt's first token. Sequences that are finished leave the batch.
//! Each new token then costs one step of one position: on a CUDA device a recorded one where the model has a decoder, in which
//! finished sequences stay to the end of their batch.

use std::time::Instant;

use candle_core::{DType, Tensor};
use espalier_adapters::Flow;
use espalier_data::TextCodec;
use espalier_models::input::PADDING;
use espalier_models::{Decoder, KvCache, Model, TokenBatch};
use serde::{Deserialize, Serialize};

use crate::limits::{longest, table_follows_length};
use crate::sampler::SamplingConfig;
use crate::sequence::{Completion, Sequence};
use crate::{Error, Result};

/// How to generate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateOptions {
    /// Most new tokens of a sequence.
    pub max_new_tokens: usize,
    /// How each token is chosen.
    pub sampling: SamplingConfig,
    /// Strings that end a text and are not part of it.
    pub stop: Vec<String>,
    /// Ids of tokens that end a sequence; see [`end_ids`].
    pub eos: Vec<u32>,
    /// Go on behind end tokens.
    pub ignore_eos: bool,
    /// Sequences that run together.
    pub batch_size: usize,
    /// Which of the adapters in the slots each prompt goes through, where several are there
    /// ([`AdapterSet::activate_by_row`](espalier_adapters::AdapterSet::activate_by_row)); empty otherwise.
    pub adapters: Vec<usize>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            sampling: SamplingConfig::greedy(),
            stop: Vec::new(),
            eos: Vec::new(),
            ignore_eos: false,
            batch_size: 16,
            adapters: Vec::new(),
        }
    }
}

impl GenerateOptions {
    /// Whether all values can be meant.
    ///
    /// # Errors
    /// Names the first option that cannot, and what is accepted.
    pub fn validate(&self) -> Result<()> {
        self.sampling.validate()?;
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::option("stop", "\"\"", "a stop string must have at least one character"));
        }
        if self.batch_size == 0 {
            return Err(Error::option("batch_size", 0, "must be at least 1"));
        }
        Ok(())
    }
}

/// A new token of a sequence. There is one event for each token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Sequence, as the prompts are numbered.
    pub sequence: usize,
    /// The token.
    pub token: u32,
    /// The text that became sure with it: whole characters only, nothing that may still become a stop string. The texts of
    /// a sequence make up the text of its completion.
    pub text: String,
}

/// Tokens and times of a generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Tokens of the prompts, without padding.
    pub prefill_tokens: usize,
    /// Seconds spent on them, and on the decoder that goes on after them.
    pub prefill_s: f64,
    /// New tokens, of all sequences.
    pub decode_tokens: usize,
    /// Seconds spent on them.
    pub decode_s: f64,
}

impl Stats {
    /// Adds the figures of another generation.
    pub fn add(&mut self, other: &Self) {
        self.prefill_tokens += other.prefill_tokens;
        self.prefill_s += other.prefill_s;
        self.decode_tokens += other.decode_tokens;
        self.decode_s += other.decode_s;
    }
}

/// What [`generate`] gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generated {
    /// One completion for each prompt, in their order.
    pub completions: Vec<Completion>,
    /// Tokens and times.
    pub stats: Stats,
}

/// Ids of the tokens that end a text of this model, by its tokenizer's files and its `config.json`.
pub fn end_ids(model: &Model, codec: &TextCodec) -> Vec<u32> {
    let mut ids = codec.stop_ids();
    ids.extend(&model.config().eos_ids);
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Ids of a text that is to be continued: with the special tokens that the tokenizer sets in front of a text, without an
/// end token that it sets behind.
///
/// # Errors
/// If the tokenizer fails.
pub fn prompt_ids(codec: &TextCodec, text: &str) -> Result<Vec<u32>> {
    let mut ids = codec.encode_text(text, true)?;
    if let Some(eos) = codec.eos_id()
        && ids.last() == Some(&eos)
        && codec.encode_text(text, false)?.last() != Some(&eos)
    {
        ids.pop();
    }
    Ok(ids)
}

/// Continues `prompts`, each a list of token ids; an empty one begins at the model's beginning-of-sequence token.
/// Sequence i draws from the random stream (seed, i).
///
/// # Errors
/// If an option cannot be meant, a prompt leaves no room for an answer or has an id outside the vocabulary, the model is no
/// decoder, or its scores are not finite.
pub fn generate(
    model: &Model,
    codec: &TextCodec,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    on_event: &mut dyn FnMut(Event),
) -> Result<Generated> {
    options.validate()?;
    if !options.stop.is_empty() && codec.tokenizer().is_none() {
        return Err(Error::option("stop", format!("{:?}", options.stop), "stop strings need a tokenizer"));
    }
    if !options.adapters.is_empty() && options.adapters.len() != prompts.len() {
        let found = format!("{} for {} prompts", options.adapters.len(), prompts.len());
        return Err(Error::option("adapters", found, "one for each prompt, or none"));
    }
    let longest = longest(model);
    let mut sequences = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| Sequence::new(index, begun(model, index, prompt)?, longest, codec, options))
        .collect::<Result<Vec<_>>>()?;
    let mut stats = Stats::default();
    let together = sequences.iter().map(Sequence::longest).max().unwrap_or(0) + model.virtual_tokens();
    let size = if table_follows_length(model.config(), together) { 1 } else { options.batch_size };
    for batch in sequences.chunks_mut(size) {
        run(model, batch, &options.adapters, &mut stats, on_event)?;
    }
    Ok(Generated { completions: sequences.into_iter().map(Sequence::complete).collect(), stats })
}

/// A prompt with at least one token, all of the model's vocabulary.
fn begun(model: &Model, index: usize, prompt: &[u32]) -> Result<Vec<u32>> {
    let fault = |message: String| Error::Prompt { index, message };
    let vocab = model.config().vocab;
    if let Some((at, id)) = prompt.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        return Err(fault(format!(
            "token {at} has id {id}, outside the model's vocabulary of {vocab}; the tokenizer is another model's"
        )));
    }
    match (prompt, model.config().bos_id) {
        ([], Some(bos)) => Ok(vec![bos]),
        ([], None) => Err(fault("it is empty, and the model has no beginning-of-sequence token to start from".into())),
        (prompt, _) => Ok(prompt.to_vec()),
    }
}

/// Generates one batch to its end.
fn run(
    model: &Model,
    batch: &mut [Sequence<'_>],
    adapters: &[usize],
    stats: &mut Stats,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let mut live: Vec<&mut Sequence<'_>> = batch.iter_mut().filter(|s| !s.is_finished()).collect();
    if live.is_empty() {
        return Ok(());
    }
    let (flow, mut cache) = (flow(&live, adapters), model.new_cache());
    let start = Instant::now();
    let prompts: Vec<&[u32]> = live.iter().map(|s| s.tokens()).collect();
    let mut scores = rows(&model.advance(&left_padded(&prompts), &mut cache, &flow)?)?;
    stats.prefill_tokens += prompts.iter().map(|p| p.len()).sum::<usize>();
    let most = live.iter().map(|s| s.longest() - s.tokens().len()).max().unwrap_or(0);
    let decoder = if most > 1 { model.decoder(&cache, cache.len() + most, &flow)? } else { None };
    stats.prefill_s += start.elapsed().as_secs_f64();
    let start = Instant::now();
    let next = take(&mut live, &mut scores, stats, on_event)?;
    match decoder {
        Some(decoder) => decode(decoder, live, next, stats, on_event)?,
        None => advance(model, cache, live, (next, adapters), stats, on_event)?,
    }
    stats.decode_s += start.elapsed().as_secs_f64();
    Ok(())
}

/// The pass of these sequences, each through its adapter.
fn flow(live: &[&mut Sequence<'_>], adapters: &[usize]) -> Flow {
    if adapters.is_empty() {
        return Flow::eval();
    }
    Flow::by_row(live.iter().map(|s| adapters[s.index()]).collect::<Vec<_>>())
}

/// Lets each sequence choose a token by its scores; the tokens, None of those that are finished with it.
fn take(
    live: &mut [&mut Sequence<'_>],
    scores: &mut [Vec<f32>],
    stats: &mut Stats,
    on_event: &mut dyn FnMut(Event),
) -> Result<Vec<Option<u32>>> {
    let mut next = Vec::with_capacity(live.len());
    for (sequence, logits) in live.iter_mut().zip(scores) {
        let token = sequence.step(logits, on_event)?;
        stats.decode_tokens += 1;
        next.push(Some(token).filter(|_| !sequence.is_finished()));
    }
    Ok(next)
}

/// Goes on by whole passes; sequences that are finished leave the batch.
fn advance(
    model: &Model,
    mut cache: KvCache,
    mut live: Vec<&mut Sequence<'_>>,
    (mut next, adapters): (Vec<Option<u32>>, &[usize]),
    stats: &mut Stats,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    loop {
        let keep: Vec<u32> = (0..).zip(&next).filter_map(|(row, id)| id.map(|_| row)).collect();
        let before = live.len();
        live.retain(|s| !s.is_finished());
        if live.is_empty() {
            return Ok(());
        }
        if live.len() < before {
            cache.keep_rows(&keep)?;
        }
        let ids = next.into_iter().flatten().collect();
        let positions = live.iter().map(|s| s.tokens().len() as u32 - 1).collect();
        let input = TokenBatch { batch: live.len(), length: 1, ids, positions, segments: None, token_types: None };
        let mut scores = rows(&model.advance(&input, &mut cache, &flow(&live, adapters))?)?;
        next = take(&mut live, &mut scores, stats, on_event)?;
    }
}

/// Goes on by steps of a decoder. Sequences that are finished leave the batch, or what their rows give is not used.
fn decode(
    mut decoder: Decoder,
    mut live: Vec<&mut Sequence<'_>>,
    next: Vec<Option<u32>>,
    stats: &mut Stats,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let mut ids: Vec<u32> = next.into_iter().map(|id| id.unwrap_or(0)).collect();
    while live.iter().any(|s| !s.is_finished()) {
        let unfinished: Vec<usize> = (0..live.len()).filter(|row| !live[*row].is_finished()).collect();
        if unfinished.len() < live.len() && decoder.keep_rows(&unfinished)? {
            ids = unfinished.iter().map(|row| ids[*row]).collect();
            live.retain(|s| !s.is_finished());
        }
        // A sequence takes its one token where the device chose it, and scores where it chooses itself.
        let greedy = live.iter().all(|s| s.is_greedy());
        let chosen = if greedy { decoder.step_greedy(Some(&ids))? } else { Vec::new() };
        let mut scores = if greedy { Vec::new() } else { rows(&decoder.step(&ids)?)? };
        for (row, sequence) in live.iter_mut().enumerate().filter(|(_, s)| !s.is_finished()) {
            ids[row] = match chosen.get(row) {
                Some(token) => sequence.take(*token, on_event)?,
                None => sequence.step(&mut scores[row], on_event)?,
            };
            stats.decode_tokens += 1;
        }
    }
    Ok(())
}

/// Scores [b, vocabulary] on the host.
fn rows(scores: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(scores.to_dtype(DType::F32)?.to_vec2()?)
}

/// Rows that end together. Padding has id and position 0, which nothing sees.
fn left_padded(prompts: &[&[u32]]) -> TokenBatch {
    let length = prompts.iter().map(|p| p.len()).max().unwrap_or(0);
    let (mut ids, mut positions, mut segments) = (Vec::new(), Vec::new(), Vec::new());
    for prompt in prompts {
        let pad = length - prompt.len();
        ids.extend(std::iter::repeat_n(0, pad).chain(prompt.iter().copied()));
        positions.extend(std::iter::repeat_n(0, pad).chain(0..prompt.len() as u32));
        segments.extend(std::iter::repeat_n(PADDING, pad).chain(std::iter::repeat_n(0, prompt.len())));
    }
    let segments = segments.contains(&PADDING).then_some(segments);
    TokenBatch { batch: prompts.len(), length, ids, positions, segments, token_types: None }
}
