//! Exact match: the greedy answer against the expected one, both without white space around them.
//!
//! Of a conversation the last assistant's turn is expected and everything before it is the prompt; of a prompt with a
//! completion, the completion.

use espalier_data::{Message, Row, RowError, TextCodec};
use espalier_models::Model;
use serde::{Deserialize, Serialize};

use super::{Progress, Refused, refuse, share};
use crate::generate::{GenerateOptions, Stats, generate, prompt_ids};
use crate::limits::longest;
use crate::sampler::SamplingConfig;
use crate::{Error, Result};

/// An answer and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Row, from 0.
    pub row: usize,
    /// What the model was given.
    pub prompt: String,
    /// What was expected.
    pub expected: String,
    /// What the model answered.
    pub answer: String,
    /// Whether they are the same.
    pub correct: bool,
}

/// Exact match over rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExactMatch {
    /// Rows that counted.
    pub used: usize,
    /// Rows that did not, by reason.
    pub refused: Refused,
    /// Rows answered as expected.
    pub correct: usize,
    /// Their share.
    pub accuracy: f64,
    /// Every answer, in the order of the rows.
    pub pairs: Vec<Pair>,
    /// Tokens and times.
    pub stats: Stats,
}

/// A row as prompt and expected answer.
struct Task {
    row: usize,
    ids: Vec<u32>,
    prompt: String,
    expected: String,
}

/// Exact match of `model` over `rows`. The options say when an answer ends; their sampling is not used: answers are greedy.
///
/// # Errors
/// If generation fails or no row is left.
pub fn exact_match(
    model: &Model,
    codec: &TextCodec,
    rows: &[Row],
    options: &GenerateOptions,
    progress: Progress<'_>,
) -> Result<ExactMatch> {
    let options = GenerateOptions { sampling: SamplingConfig::greedy(), ..options.clone() };
    options.validate()?;
    let mut refused = Refused::new();
    let mut tasks = Vec::new();
    let longest = longest(model);
    for (row, content) in rows.iter().enumerate() {
        match task(codec, row, content) {
            Ok(task) if task.ids.is_empty() && model.config().bos_id.is_none() => refuse(&mut refused, "empty_prompt"),
            Ok(task) if task.ids.len() >= longest => refuse(&mut refused, "prompt_longer_than_the_model"),
            Ok(task) => tasks.push(task),
            Err(Refusal::Reason(reason)) => refuse(&mut refused, reason),
            Err(Refusal::Error(error)) => return Err(error),
        }
    }
    if tasks.is_empty() {
        return Err(Error::Empty { rows: rows.len(), refused });
    }
    // Prompts of like length share a batch.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.ids.len()));
    let (mut pairs, mut stats) = (Vec::with_capacity(tasks.len()), Stats::default());
    for batch in tasks.chunks(options.batch_size) {
        let prompts: Vec<Vec<u32>> = batch.iter().map(|task| task.ids.clone()).collect();
        let generated = generate(model, codec, &prompts, &options, &mut |_| {})?;
        stats.add(&generated.stats);
        for (task, completion) in batch.iter().zip(generated.completions) {
            pairs.push(Pair {
                row: task.row,
                prompt: task.prompt.clone(),
                expected: task.expected.clone(),
                correct: completion.text.trim() == task.expected.trim(),
                answer: completion.text,
            });
        }
        progress(pairs.len(), tasks.len());
    }
    pairs.sort_by_key(|pair| pair.row);
    let correct = pairs.iter().filter(|pair| pair.correct).count();
    Ok(ExactMatch { used: pairs.len(), refused, correct, accuracy: share(correct, pairs.len()), pairs, stats })
}

/// Why a row is no task: counted, or an error of the whole.
enum Refusal {
    Reason(&'static str),
    Error(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        match error {
            Error::Text(error) => error.into(),
            other => Self::Error(other),
        }
    }
}

impl From<RowError> for Refusal {
    fn from(error: RowError) -> Self {
        match error {
            // No row will do better.
            RowError::NoTemplate | RowError::NoTokenizer => Self::Error(error.into()),
            other => Self::Reason(other.reason()),
        }
    }
}

fn task(codec: &TextCodec, row: usize, content: &Row) -> std::result::Result<Task, Refusal> {
    let chat = |messages: &[Message], tools: Option<&serde_json::Value>, expected: &str| {
        let template = codec.template().ok_or(RowError::NoTemplate)?;
        let prompt = template.render_text(messages, tools, true)?;
        Ok(Task { row, ids: codec.encode_text(&prompt, false)?, prompt, expected: expected.to_owned() })
    };
    match content {
        Row::Messages { messages, tools } => {
            let last =
                messages.iter().rposition(|m| m.role == "assistant").ok_or(Refusal::Reason("no_assistant_turn"))?;
            let (before, from) = messages.split_at(last);
            let expected = from.first().map_or("", |m| m.content.as_str());
            if expected.trim().is_empty() {
                return Err(Refusal::Reason("empty_reference"));
            }
            chat(before, tools.as_ref(), expected)
        }
        Row::PromptCompletion { completion, .. } if completion.trim().is_empty() => {
            Err(Refusal::Reason("empty_reference"))
        }
        Row::PromptCompletion { prompt, completion } if codec.options().apply_chat_template => {
            chat(&[Message::new("user", prompt.trim_end())], None, completion)
        }
        Row::PromptCompletion { prompt, completion } => {
            Ok(Task { row, ids: prompt_ids(codec, prompt)?, prompt: prompt.clone(), expected: completion.clone() })
        }
        _ => Err(Refusal::Reason("no_prompt_and_answer")),
    }
}
