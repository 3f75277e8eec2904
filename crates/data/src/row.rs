//! What a record means: the kinds of training row, whatever file they came from.
//!
//! Records become rows by their keys (see [`Row::from_value`]): chat messages, prompt and completion, plain text,
//! classification, ready token ids, or a preference between two replies.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what the template knows.
    pub role: String,
    /// What is said; empty where a message has only tool calls.
    pub content: String,
    /// Every other key of the message (`tool_calls`, `name`, `weight`, ...), handed to the template as it is.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of nothing but role and content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }

    /// Whether the loss counts this message: an assistant's, unless its `weight` is 0.
    pub fn is_trained(&self) -> bool {
        self.role == "assistant" && self.extra.get("weight").and_then(Value::as_f64) != Some(0.0)
    }

    /// The message as the template sees it. Content is null where there are only tool calls, as `transformers` has it.
    pub(crate) fn view(&self) -> Value {
        let mut map = Map::new();
        map.insert("role".into(), Value::String(self.role.clone()));
        let only_calls = self.content.is_empty() && self.has_tool_calls();
        map.insert("content".into(), if only_calls { Value::Null } else { Value::String(self.content.clone()) });
        for (key, value) in &self.extra {
            map.insert(key.clone(), value.clone());
        }
        Value::Object(map)
    }

    pub(crate) fn has_tool_calls(&self) -> bool {
        self.extra.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty())
    }
}

/// A class label as the data gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label {
    /// By number, from 0.
    Index(usize),
    /// By name; a decimal number in text form is taken as an index where no name matches.
    Name(String),
}

/// One side of a preference: plain text or messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turns {
    /// Plain text.
    Text(String),
    /// Messages of a conversation.
    Messages(Vec<Message>),
}

/// One training row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// A conversation; what assistants say is trained.
    Messages {
        /// The messages in order, at least one.
        messages: Vec<Message>,
        /// Tool descriptions for the template.
        tools: Option<Value>,
    },
    /// Text with a trained continuation.
    PromptCompletion {
        /// The given part.
        prompt: String,
        /// The trained part, joined to the prompt without anything between.
        completion: String,
    },
    /// Plain text, all of it trained.
    Text {
        /// The text.
        text: String,
    },
    /// A text or a pair with its class.
    Classification {
        /// First text.
        text: String,
        /// Second text of a pair.
        text_pair: Option<String>,
        /// Its class.
        label: Label,
    },
    /// Ready token ids.
    Tokens {
        /// Token ids `[t]`.
        input_ids: Vec<u32>,
        /// Label of each token itself `[t]`, -100 where masked; absent: every token is trained.
        labels: Option<Vec<i64>>,
        /// 1 for tokens, 0 for padding `[t]`; padding is dropped.
        attention_mask: Option<Vec<u8>>,
    },
    /// A better and a worse reply.
    Preference {
        /// What both replies answer, where given apart.
        prompt: Option<Turns>,
        /// The better reply.
        chosen: Turns,
        /// The worse reply.
        rejected: Turns,
    },
}

impl Row {
    /// About how many bytes of text the row holds, to bound what is encoded at once.
    pub(crate) fn weight(&self) -> usize {
        let said = |messages: &[Message]| messages.iter().map(|m| m.content.len() + 32).sum::<usize>();
        let turns = |turns: &Turns| match turns {
            Turns::Text(text) => text.len(),
            Turns::Messages(messages) => said(messages),
        };
        match self {
            Row::Messages { messages, .. } => said(messages),
            Row::PromptCompletion { prompt, completion } => prompt.len() + completion.len(),
            Row::Text { text } => text.len(),
            Row::Classification { text, text_pair, .. } => text.len() + text_pair.as_ref().map_or(0, String::len),
            Row::Tokens { input_ids, .. } => 16 * input_ids.len(),
            Row::Preference { prompt, chosen, rejected } => {
                prompt.as_ref().map_or(0, turns) + turns(chosen) + turns(rejected)
            }
        }
    }
}
