//! Choice accuracy by log-likelihood: the choice that the model finds most likely behind the prompt is its answer.
//!
//! Equation: score(c) = sum over tokens of c of ln p(token | prompt, tokens before); normalised: score / bytes of c
//! Source:   the `acc` and `acc_norm` of EleutherAI's lm-evaluation-harness: prompt and choice are joined by a space and
//!           tokenised as one text; the tokens behind those of the prompt alone are the choice's

use espalier_data::{Message, RowError, TextCodec};
use espalier_models::Model;
use serde::{Deserialize, Serialize};

use super::losses::{Target, token_losses};
use super::question::ChoiceRow;
use super::{EvalOptions, Progress, Refused, batches, expect_decoder, refuse, share};
use crate::generate::prompt_ids;
use crate::limits::longest;
use crate::{Error, Result};

/// The answer to one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChoiceAnswer {
    /// Row, from 0.
    pub row: usize,
    /// Index of the right choice.
    pub answer: usize,
    /// The most likely choice.
    pub chosen: usize,
    /// The most likely choice a byte.
    pub chosen_normalised: usize,
    /// Log-likelihood of each choice, in nats.
    pub log_likelihoods: Vec<f64>,
}

/// Choice accuracy over questions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChoiceAccuracy {
    /// Questions that counted.
    pub used: usize,
    /// Questions that did not, by reason.
    pub refused: Refused,
    /// Right answers by log-likelihood.
    pub correct: usize,
    /// Their share.
    pub accuracy: f64,
    /// Right answers by log-likelihood a byte.
    pub correct_normalised: usize,
    /// Their share.
    pub accuracy_normalised: f64,
    /// Accuracy of guessing: the mean of 1 / choices.
    pub chance: f64,
    /// Every answer, in the order of the rows.
    pub answers: Vec<ChoiceAnswer>,
}

/// Prompt and one choice as tokens.
struct Candidate {
    ids: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
}

/// Choice accuracy of `model` over `rows`. The codec's `apply_chat_template` puts the prompt into a user's message and the
/// choice behind the opening of the assistant's turn.
///
/// # Errors
/// If the model is no decoder or no row is left.
pub fn choice_accuracy(
    model: &Model,
    codec: &TextCodec,
    rows: &[ChoiceRow],
    options: &EvalOptions,
    progress: Progress<'_>,
) -> Result<ChoiceAccuracy> {
    expect_decoder(model, "choice accuracy")?;
    let mut refused = Refused::new();
    let longest = longest(model);
    let (mut used, mut candidates) = (Vec::new(), Vec::new());
    for (row, question) in rows.iter().enumerate() {
        let made =
            match question.choices.iter().map(|c| candidate(codec, &question.prompt, c)).collect::<Result<Vec<_>>>() {
                Ok(made) => made,
                Err(Error::Text(error)) if !matches!(error, RowError::NoTemplate | RowError::NoTokenizer) => {
                    refuse(&mut refused, error.reason());
                    continue;
                }
                Err(error) => return Err(error),
            };
        if question.answer >= question.choices.len() {
            refuse(&mut refused, "answer_is_no_choice");
        } else if made.iter().any(|c| c.prompt == 0) {
            refuse(&mut refused, "empty_prompt");
        } else if question.choices.iter().any(|c| c.trim().is_empty()) || made.iter().any(|c| c.ids.len() <= c.prompt) {
            refuse(&mut refused, "empty_choice");
        } else if made.iter().any(|c| c.ids.len() > longest) {
            refuse(&mut refused, "longer_than_the_model");
        } else {
            used.push((row, question, candidates.len()));
            candidates.extend(made);
        }
    }
    if used.is_empty() {
        return Err(Error::Empty { rows: rows.len(), refused });
    }
    let scores = log_likelihoods(model, &candidates, options, progress)?;
    let answers: Vec<ChoiceAnswer> = used
        .iter()
        .map(|(row, question, first)| {
            let own = scores.get(*first..first + question.choices.len()).unwrap_or_default().to_vec();
            let bytes = question.choices.iter().map(|c| c.len().max(1) as f64);
            let normalised: Vec<f64> = own.iter().zip(bytes).map(|(score, bytes)| score / bytes).collect();
            ChoiceAnswer {
                row: *row,
                answer: question.answer,
                chosen: largest(&own),
                chosen_normalised: largest(&normalised),
                log_likelihoods: own,
            }
        })
        .collect();
    let correct = answers.iter().filter(|a| a.chosen == a.answer).count();
    let correct_normalised = answers.iter().filter(|a| a.chosen_normalised == a.answer).count();
    let chance = used.iter().map(|(_, q, _)| 1.0 / q.choices.len() as f64).sum::<f64>() / used.len() as f64;
    Ok(ChoiceAccuracy {
        used: used.len(),
        refused,
        correct,
        accuracy: share(correct, used.len()),
        correct_normalised,
        accuracy_normalised: share(correct_normalised, used.len()),
        chance,
        answers,
    })
}

/// Log-likelihood of each candidate's choice.
fn log_likelihoods(
    model: &Model,
    candidates: &[Candidate],
    options: &EvalOptions,
    progress: Progress<'_>,
) -> Result<Vec<f64>> {
    let lengths: Vec<usize> = candidates.iter().map(|c| c.ids.len()).collect();
    let mut scores = vec![0.0; candidates.len()];
    let mut done = 0;
    for batch in batches(model, &lengths, options)? {
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for (row, candidate) in batch.iter().filter_map(|i| candidates.get(*i)).enumerate() {
            rows.push(candidate.ids.clone());
            let choice = candidate.ids.iter().enumerate().skip(candidate.prompt);
            targets.extend(choice.map(|(place, id)| Target { row, place, id: *id }));
        }
        for (target, loss) in targets.iter().zip(token_losses(model, &rows, &targets)?) {
            if let Some(score) = batch.get(target.row).and_then(|i| scores.get_mut(*i)) {
                *score -= loss;
            }
        }
        done += batch.len();
        progress(done, candidates.len());
    }
    Ok(scores)
}

/// Tokens of prompt and choice. White space at the end of the prompt goes to the choice, as words begin with it.
fn candidate(codec: &TextCodec, prompt: &str, choice: &str) -> Result<Candidate> {
    if codec.options().apply_chat_template {
        let template = codec.template().ok_or(RowError::NoTemplate)?;
        let opening = template.render_text(&[Message::new("user", prompt.trim_end())], None, true)?;
        let given = codec.encode_text(&opening, false)?;
        let ids = codec.encode_text(&format!("{opening}{}", choice.trim_start()), false)?;
        return Ok(Candidate { prompt: given.len(), ids });
    }
    let given = prompt.trim_end();
    let between = match &prompt[given.len()..] {
        "" if !choice.starts_with(char::is_whitespace) => " ",
        own => own,
    };
    let before = prompt_ids(codec, given)?;
    let ids = prompt_ids(codec, &format!("{given}{between}{choice}"))?;
    Ok(Candidate { prompt: before.len(), ids })
}

/// Index of the first of the largest.
fn largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if values.get(best).is_none_or(|most| value > most) {
            best = i;
        }
    }
    best
}
