//! Whether what is trained ends where the model should stop, and what the length limit did to it.

use crate::encode::{Example, IGNORE, TextCodec, Truncation};
use crate::error::{DataError, Location, Result};
use crate::row::Row;

/// Counts over all answers: trained turns of conversations, and completions.
#[derive(Default)]
pub(super) struct Answers {
    /// Examples with an answer.
    all: u64,
    /// Those of which one does not end in a stop token, though nothing was cut off.
    endless: u64,
    /// Those through which the length limit cut.
    pub(super) cut: u64,
    /// Conversations of which only the last turn is trained.
    pub(super) last_turn_only: u64,
}

impl Answers {
    /// Counts an example; a conversation that would not teach the model to stop is an error unless it is accepted.
    pub(super) fn count(&mut self, codec: &TextCodec, location: &Location, row: &Row, example: &Example) -> Result<()> {
        let conversation = match row {
            Row::Messages { .. } => true,
            Row::PromptCompletion { .. } => codec.options().apply_chat_template,
            _ => return Ok(()),
        };
        self.all += 1;
        self.cut += u64::from(example.answer_cut);
        self.last_turn_only += u64::from(example.last_turn_only);
        let Some(last) = endless(example, codec) else { return Ok(()) };
        let options = codec.options();
        if conversation && options.completion_only && !options.allow_no_stop {
            return Err(DataError::NoStop {
                location: location.clone(),
                token: name(codec, last),
                stops: names(codec),
            });
        }
        self.endless += 1;
        Ok(())
    }

    /// What the user should know of them.
    pub(super) fn notes(&self, codec: &TextCodec) -> Vec<String> {
        let mut notes = Vec::new();
        if self.endless > 0 {
            notes.push(format!(
                "{} of {} answers do not end in a stop token, so the model does not learn to stop there; stop tokens are {}",
                self.endless,
                self.all,
                names(codec)
            ));
        }
        if self.cut > 0 {
            let (what, taught) = match codec.options().truncation {
                Truncation::Left => ("beginning", "they are trained from where they were cut"),
                _ => ("end", "they are trained as far as they go, and teach no stop there"),
            };
            notes.push(format!("{} of {} answers lost their {what} at max_length; {taught}", self.cut, self.all));
        }
        if self.last_turn_only > 0 {
            notes.push(format!(
                "{} of {} answers are trained in their last turn only: the chat template writes earlier turns otherwise once \
                 others follow",
                self.last_turn_only, self.all
            ));
        }
        notes
    }
}

/// The last token of a trained part that is no stop token. A part that lost its end to the length limit has none.
fn endless(example: &Example, codec: &TextCodec) -> Option<u32> {
    let stops = codec.stop_ids();
    let trained = |at: usize| example.labels.get(at).is_some_and(|label| *label != IGNORE);
    let lost_end = example.answer_cut && codec.options().truncation == Truncation::Right;
    let length = example.labels.len() - usize::from(lost_end);
    (0..length)
        .filter(|at| trained(*at) && !trained(at + 1))
        .filter_map(|at| example.input_ids.get(at).copied())
        .find(|id| !stops.contains(id))
}

fn name(codec: &TextCodec, id: u32) -> String {
    codec.decode(&[id], false).unwrap_or_else(|_| id.to_string())
}

fn names(codec: &TextCodec) -> String {
    let names: Vec<String> = codec.stop_ids().into_iter().map(|id| name(codec, id)).collect();
    if names.is_empty() { "none is known".into() } else { names.join(" ") }
}
