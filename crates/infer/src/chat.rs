//! A conversation: the template renders what was said, the model answers, the answer joins the conversation.

use espalier_data::{Message, RowError, TextCodec};
use espalier_models::Model;
use serde_json::Value;

use crate::Result;
use crate::generate::{GenerateOptions, Stats, generate};
use crate::sequence::Completion;

/// An assistant's turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// What was generated.
    pub completion: Completion,
    /// Tokens and times.
    pub stats: Stats,
}

/// A conversation with a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatSession {
    messages: Vec<Message>,
    tools: Option<Value>,
    turns: u64,
}

impl ChatSession {
    /// A conversation that begins with these messages (none, or a system message, or a history).
    pub fn new(messages: Vec<Message>) -> Self {
        Self { messages, tools: None, turns: 0 }
    }

    /// The same conversation with tool descriptions for the template.
    #[must_use]
    pub fn with_tools(mut self, tools: Value) -> Self {
        self.tools = Some(tools);
        self
    }

    /// What was said so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Adds a message without an answer.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Takes the last exchange back: everything from the last user's message on. Whether there was one.
    pub fn undo(&mut self) -> bool {
        match self.messages.iter().rposition(|m| m.role == "user") {
            Some(at) => {
                self.messages.truncate(at);
                true
            }
            None => false,
        }
    }

    /// Forgets everything but the opening system messages.
    pub fn clear(&mut self) {
        let opening = self.messages.iter().take_while(|m| m.role == "system").count();
        self.messages.truncate(opening);
    }

    /// Says `text` as the user and generates the answer; `on_text` gets it piece by piece. Each turn draws from its own
    /// random numbers. After an error the conversation is as before.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn say(
        &mut self,
        model: &Model,
        codec: &TextCodec,
        text: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        self.push(Message::new("user", text));
        let reply = self.answer(model, codec, options, on_text);
        if reply.is_err() {
            self.messages.pop();
        }
        reply
    }

    /// Generates the assistant's turn behind what was said so far and appends it.
    ///
    /// # Errors
    /// If there is no chat template, the template refuses the conversation, or generation fails; the conversation is then
    /// unchanged.
    pub fn answer(
        &mut self,
        model: &Model,
        codec: &TextCodec,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        if codec.template().is_none() {
            return Err(RowError::NoTemplate.into());
        }
        let prompt = codec.encode_prompt(&self.messages, self.tools.as_ref())?;
        let mut options = options.clone();
        options.sampling.seed = options.sampling.seed.wrapping_add(self.turns);
        let mut generated = generate(model, codec, &[prompt], &options, &mut |event| {
            if !event.text.is_empty() {
                on_text(&event.text);
            }
        })?;
        let Some(completion) = generated.completions.pop() else {
            return Err(crate::Error::Scores("the generation gave no sequence".into()));
        };
        self.turns += 1;
        self.messages.push(Message::new("assistant", completion.text.clone()));
        Ok(Reply { completion, stats: generated.stats })
    }
}
