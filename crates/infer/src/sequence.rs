//! One sequence while it is generated: its tokens, its random stream, its text so far, and when it is finished.

use espalier_data::{StreamDecoder, TextCodec};
use serde::{Deserialize, Serialize};

use crate::generate::{Event, GenerateOptions};
use crate::sampler::Sampler;
use crate::stop::StopFilter;
use crate::{Error, Result};

/// Why a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// At an end token.
    Eos,
    /// At this stop string.
    Stop(String),
    /// At the limit of new tokens or of the model's positions.
    Length,
}

/// What was generated after one prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// The new tokens, all that were chosen: the end token and those of the stop string included.
    pub ids: Vec<u32>,
    /// Their text without special tokens, the stop string and what comes behind it.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

/// A sequence that is being generated.
pub(crate) struct Sequence<'a> {
    index: usize,
    /// Prompt and new tokens.
    tokens: Vec<u32>,
    prompt: usize,
    /// Most new tokens.
    limit: usize,
    options: &'a GenerateOptions,
    sampler: Sampler,
    decoder: Option<StreamDecoder<'a>>,
    stops: StopFilter<'a>,
    text: String,
    finish: Option<Finish>,
}

impl<'a> Sequence<'a> {
    /// Its number among the prompts.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Sequence number `index` after `prompt`, of at most `longest` tokens together.
    pub(crate) fn new(
        index: usize,
        prompt: Vec<u32>,
        longest: usize,
        codec: &'a TextCodec,
        options: &'a GenerateOptions,
    ) -> Result<Self> {
        if prompt.len() >= longest {
            return Err(Error::Prompt {
                index,
                message: format!(
                    "{} tokens leave no room for an answer within the {longest} positions of the model; shorten it",
                    prompt.len()
                ),
            });
        }
        let limit = options.max_new_tokens.min(longest - prompt.len());
        Ok(Self {
            index,
            prompt: prompt.len(),
            limit,
            tokens: prompt,
            options,
            sampler: Sampler::new(&options.sampling, index)?,
            // A codec of ids alone has no text to give.
            decoder: codec.tokenizer().map(|_| codec.stream(true)),
            stops: StopFilter::new(&options.stop),
            text: String::new(),
            finish: (limit == 0).then_some(Finish::Length),
        })
    }

    /// Prompt and new tokens.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Most tokens that it can come to.
    pub(crate) fn longest(&self) -> usize {
        self.prompt + self.limit
    }

    /// Whether nothing more is to come.
    pub(crate) fn is_finished(&self) -> bool {
        self.finish.is_some()
    }

    /// Chooses the next token by its scores and reports it.
    pub(crate) fn step(&mut self, logits: &mut [f32], on_event: &mut dyn FnMut(Event)) -> Result<u32> {
        let token = self.sampler.sample(logits, &self.tokens)?;
        self.push(token, on_event)
    }

    /// Whether the next token is always the first of the most likely ones.
    pub(crate) fn is_greedy(&self) -> bool {
        self.options.sampling.takes_the_best()
    }

    /// Takes the first of the most likely tokens, chosen elsewhere; `u32::MAX` says that scores are not finite.
    pub(crate) fn take(&mut self, token: u32, on_event: &mut dyn FnMut(Event)) -> Result<u32> {
        if token == u32::MAX {
            return Err(Error::Scores("a token has NaN or infinity, or none has a finite score".into()));
        }
        self.push(token, on_event)
    }

    /// Appends the next token and reports it.
    fn push(&mut self, token: u32, on_event: &mut dyn FnMut(Event)) -> Result<u32> {
        self.tokens.push(token);
        let end = !self.options.ignore_eos && self.options.eos.contains(&token);
        let piece = match &mut self.decoder {
            Some(decoder) if !end => decoder.push(token)?.unwrap_or_default(),
            _ => String::new(),
        };
        let (mut text, mut stop) = self.stops.push(&piece);
        let full = self.tokens.len() - self.prompt >= self.limit;
        if stop.is_none() && (end || full) {
            let rest = self.decoder.take().map(StreamDecoder::finish).transpose()?.flatten().unwrap_or_default();
            let (more, late) = self.stops.push(&rest);
            text.push_str(&more);
            stop = late;
            if stop.is_none() {
                text.push_str(&self.stops.flush());
            }
        }
        self.finish = match stop {
            Some(stop) => Some(Finish::Stop(stop.to_owned())),
            None if end => Some(Finish::Eos),
            None if full => Some(Finish::Length),
            None => None,
        };
        self.text.push_str(&text);
        on_event(Event { sequence: self.index, token, text });
        Ok(token)
    }

    /// What was generated.
    pub(crate) fn complete(self) -> Completion {
        Completion {
            ids: self.tokens.get(self.prompt..).unwrap_or_default().to_vec(),
            text: self.text,
            finish: self.finish.unwrap_or(Finish::Length),
            prompt_tokens: self.prompt,
        }
    }
}
