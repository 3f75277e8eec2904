//! From the keys of a record to the kind of row.
//!
//! Order of precedence: columns named in the options; messages; chosen and rejected; input_ids; prompt and completion in
//! their usual names; text with a label; text. A null value counts as absent, but a null label is an error. Keys that would
//! change the meaning of the row and are not understood (a history beside an instruction) refuse it.

use serde_json::{Map, Value};

use crate::error::RowError;
use crate::row::{Label, Message, Row, Turns};
use crate::source::DataOptions;

type Outcome<T> = std::result::Result<T, RowError>;

/// Names of prompt and completion, tried in this order.
const PAIRS: [(&str, &str); 6] = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("inputs", "targets"),
];

/// What a prompt may depend on, by parts of column names: beside a bare question they must not be dropped.
const GROUNDS: [&str; 15] = [
    "context",
    "passage",
    "choice",
    "option",
    "document",
    "abstract",
    "paragraph",
    "article",
    "evidence",
    "support",
    "fact",
    "hint",
    "story",
    "table",
    "background",
];

/// Columns that no guessed prompt contains, whatever its name.
const BESIDE: [&str; 5] = ["history", "system", "image", "images", "tools"];

/// Names of first and second text of a classification, tried in this order.
const TEXTS: [(&str, Option<&str>); 8] = [
    ("sentence1", Some("sentence2")),
    ("premise", Some("hypothesis")),
    ("question1", Some("question2")),
    ("question", Some("sentence")),
    ("text", Some("text_pair")),
    ("text", None),
    ("sentence", None),
    ("premise", None),
];

impl Row {
    /// The row that a record of named columns means.
    pub fn from_value(value: Value, options: &DataOptions) -> std::result::Result<Row, RowError> {
        let map = match value {
            Value::Object(map) => map,
            Value::Array(_) => return Err(RowError::NotAnObject("a list")),
            Value::String(_) => return Err(RowError::NotAnObject("a string")),
            Value::Null => return Err(RowError::NotAnObject("null")),
            _ => return Err(RowError::NotAnObject("a number or a boolean")),
        };
        let fields = Fields { map };
        match by_options(&fields, options)? {
            Some(row) => Ok(row),
            None => by_keys(&fields),
        }
    }
}

fn by_options(fields: &Fields, o: &DataOptions) -> Outcome<Option<Row>> {
    let name = |column: &Option<String>, default: &str| column.clone().unwrap_or_else(|| default.to_string());
    if let Some(column) = &o.messages_column {
        return fields.conversation(column, &name(&o.tools_column, "tools")).map(Some);
    }
    if o.chosen_column.is_some() || o.rejected_column.is_some() {
        let (chosen, rejected) = (name(&o.chosen_column, "chosen"), name(&o.rejected_column, "rejected"));
        return fields.preference(&name(&o.prompt_column, "prompt"), &chosen, &rejected).map(Some);
    }
    if let Some(column) = &o.input_ids_column {
        return fields.tokens(column, &name(&o.labels_column, "labels")).map(Some);
    }
    if o.prompt_column.is_some() || o.completion_column.is_some() {
        let (prompt, completion) = (name(&o.prompt_column, "prompt"), name(&o.completion_column, "completion"));
        return fields.prompt_completion(&prompt, &completion).map(Some);
    }
    if let Some(label) = &o.label_column {
        let (text, pair) = match &o.text_column {
            Some(text) => (text.clone(), o.text_pair_column.clone()),
            None => match fields.text_columns() {
                Some((text, pair)) => (text.to_string(), o.text_pair_column.clone().or(pair.map(str::to_string))),
                None => return Err(fields.missing("text")),
            },
        };
        return fields.classification(&text, pair.as_deref(), label).map(Some);
    }
    match &o.text_column {
        Some(column) => Ok(Some(Row::Text { text: fields.text(column)? })),
        None => Ok(None),
    }
}

fn by_keys(fields: &Fields) -> Outcome<Row> {
    if fields.has("chosen") && fields.has("rejected") {
        let prompt =
            ["prompt", "messages", "conversations"].into_iter().find(|key| fields.has(key)).unwrap_or("prompt");
        return fields.preference(prompt, "chosen", "rejected");
    }
    for key in ["messages", "conversations"] {
        if fields.has(key) {
            if matches!(fields.map.get("label"), Some(Value::Bool(_))) {
                return Err(RowError::Unsupported(
                    "messages with a boolean label are rated replies; set messages_column to train on them all alike"
                        .into(),
                ));
            }
            return fields.conversation(key, "tools");
        }
    }
    if fields.has("input_ids") {
        return fields.tokens("input_ids", "labels");
    }
    if fields.map.contains_key("label")
        && let Some((text, pair)) = fields.text_columns()
    {
        return fields.classification(text, pair, "label");
    }
    for (prompt, completion) in PAIRS {
        if fields.has(prompt) && fields.has(completion) {
            let lost = fields.lost_beside(prompt);
            if let Some(key) = lost {
                return Err(RowError::Unsupported(format!(
                    "{prompt} and {completion} come with {key:?}, which would be lost; fold it into one column and name that as prompt_column"
                )));
            }
            return fields.prompt_completion(prompt, completion);
        }
    }
    if fields.has("text") {
        return Ok(Row::Text { text: fields.text("text")? });
    }
    Err(RowError::Shape { found: fields.keys() })
}

struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    fn is_filled(&self, key: &str) -> bool {
        match self.map.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::String(s)) => !s.trim().is_empty() && s.trim() != "[]",
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        }
    }

    /// A filled column that belongs to the prompt and would not be in it.
    fn lost_beside(&self, prompt: &str) -> Option<&str> {
        let bare = matches!(prompt, "question" | "inputs");
        // An instruction has room for one of these.
        let both = prompt == "instruction" && self.is_filled("input") && self.is_filled("context");
        self.map.keys().map(String::as_str).filter(|key| self.is_filled(key)).find(|key| {
            let name = key.to_ascii_lowercase();
            BESIDE.contains(&name.as_str())
                || (bare && GROUNDS.iter().any(|part| name.contains(part)))
                || (both && *key == "context")
        })
    }

    fn keys(&self) -> String {
        self.map.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    fn missing(&self, key: &str) -> RowError {
        RowError::Missing { key: key.to_string(), found: self.keys() }
    }

    fn get(&self, key: &str) -> Outcome<&Value> {
        self.map.get(key).filter(|value| !value.is_null()).ok_or_else(|| self.missing(key))
    }

    fn text(&self, key: &str) -> Outcome<String> {
        match self.get(key)? {
            Value::String(text) => Ok(text.clone()),
            other => Err(RowError::kind(key, "a string", other)),
        }
    }

    fn text_columns(&self) -> Option<(&'static str, Option<&'static str>)> {
        TEXTS.into_iter().find(|(text, pair)| self.has(text) && pair.is_none_or(|pair| self.has(pair)))
    }

    fn conversation(&self, key: &str, tools: &str) -> Outcome<Row> {
        let mut messages = messages(key, self.get(key)?)?;
        if self.is_filled("system") && messages.first().is_none_or(|m| m.role != "system") {
            messages.insert(0, Message::new("system", self.text("system")?));
        }
        let tools = match self.map.get(tools) {
            Some(value) if self.is_filled(tools) => Some(parsed(tools, value)?.into_owned()),
            _ => None,
        };
        Ok(Row::Messages { messages, tools })
    }

    fn prompt_completion(&self, prompt: &str, completion: &str) -> Outcome<Row> {
        if self.get(prompt)?.is_array() {
            // A conversation cut in two: only the second part is trained.
            let mut all = messages(prompt, self.get(prompt)?)?;
            for message in all.iter_mut() {
                message.extra.insert("weight".into(), Value::from(0));
            }
            all.extend(messages(completion, self.get(completion)?)?);
            return Ok(Row::Messages { messages: all, tools: None });
        }
        let mut text = self.text(prompt)?;
        if prompt == "instruction"
            && let Some(input) = ["input", "context"].into_iter().find(|key| self.is_filled(key))
        {
            text = format!("{text}\n\n{}", self.text(input)?);
        }
        if prompt != "prompt" && matches!(prompt, "instruction" | "question") {
            text.push_str("\n\n");
        }
        Ok(Row::PromptCompletion { prompt: text, completion: self.text(completion)? })
    }

    fn classification(&self, text: &str, pair: Option<&str>, label: &str) -> Outcome<Row> {
        let class = match self.get(label)? {
            Value::Bool(yes) => Label::Index(usize::from(*yes)),
            Value::String(name) => Label::Name(name.clone()),
            other => match whole(other).and_then(|n| usize::try_from(n).ok()) {
                Some(index) => Label::Index(index),
                None => return Err(RowError::kind(label, "a class index from 0 or a class name", other)),
            },
        };
        let text_pair = pair.map(|pair| self.text(pair)).transpose()?;
        Ok(Row::Classification { text: self.text(text)?, text_pair, label: class })
    }

    fn tokens(&self, ids: &str, labels: &str) -> Outcome<Row> {
        let input_ids = integers(ids, self.get(ids)?)?
            .into_iter()
            .enumerate()
            .map(|(at, id)| {
                u32::try_from(id).map_err(|_| RowError::TokenId { key: "input_ids", at, id, vocab: u32::MAX as usize })
            })
            .collect::<Outcome<Vec<u32>>>()?;
        let labels = if self.has(labels) { Some(integers(labels, self.get(labels)?)?) } else { None };
        let attention_mask = if self.has("attention_mask") {
            let mask = integers("attention_mask", self.get("attention_mask")?)?;
            Some(mask.into_iter().map(|m| u8::from(m != 0)).collect())
        } else {
            None
        };
        Ok(Row::Tokens { input_ids, labels, attention_mask })
    }

    fn preference(&self, prompt: &str, chosen: &str, rejected: &str) -> Outcome<Row> {
        let turns = |key: &str| -> Outcome<Turns> {
            match self.get(key)? {
                Value::String(text) => Ok(Turns::Text(text.clone())),
                Value::Object(one) => Ok(Turns::Messages(vec![message(key, &Value::Object(one.clone()))?])),
                other => Ok(Turns::Messages(messages(key, other)?)),
            }
        };
        let prompt = if self.has(prompt) { Some(turns(prompt)?) } else { None };
        Ok(Row::Preference { prompt, chosen: turns(chosen)?, rejected: turns(rejected)? })
    }
}

/// A value that table files hold as JSON text.
fn parsed<'a>(key: &str, value: &'a Value) -> Outcome<std::borrow::Cow<'a, Value>> {
    match value {
        Value::String(text) => serde_json::from_str(text)
            .map(std::borrow::Cow::Owned)
            .map_err(|error| RowError::Json(format!("{key}: {error}"))),
        other => Ok(std::borrow::Cow::Borrowed(other)),
    }
}

fn whole(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15).map(|f| f as i64))
}

fn integers(key: &str, value: &Value) -> Outcome<Vec<i64>> {
    let value = parsed(key, value)?;
    let Value::Array(list) = value.as_ref() else {
        return Err(RowError::kind(key, "a list of integers", &value));
    };
    list.iter()
        .enumerate()
        .map(|(at, item)| whole(item).ok_or_else(|| RowError::kind(format!("{key}[{at}]"), "an integer", item)))
        .collect()
}

fn messages(key: &str, value: &Value) -> Outcome<Vec<Message>> {
    let value = parsed(key, value)?;
    let Value::Array(list) = value.as_ref() else {
        return Err(RowError::kind(key, "a list of messages", &value));
    };
    if list.is_empty() {
        return Err(RowError::kind(key, "at least one message", &value));
    }
    list.iter().enumerate().map(|(at, item)| message(&format!("{key}[{at}]"), item)).collect()
}

fn message(key: &str, value: &Value) -> Outcome<Message> {
    let Value::Object(map) = value else {
        return Err(RowError::kind(key, "a message with role and content", value));
    };
    let mut extra = map.clone();
    let (role_key, content_key) = if map.contains_key("role") { ("role", "content") } else { ("from", "value") };
    let role = match extra.shift_remove(role_key) {
        Some(Value::String(role)) => role,
        Some(other) => return Err(RowError::kind(format!("{key}.{role_key}"), "a string", &other)),
        None => return Err(RowError::kind(key, "a message with role and content (or from and value)", value)),
    };
    let role = if role_key == "role" { role } else { share_role(key, &role)? };
    let content = content(&format!("{key}.{content_key}"), extra.shift_remove(content_key))?;
    let message = Message { role, content: content.clone().unwrap_or_default(), extra };
    if content.is_none() && !message.has_tool_calls() {
        return Err(RowError::kind(format!("{key}.{content_key}"), "a string", &Value::Null));
    }
    Ok(message)
}

/// Roles of the `from` / `value` layout.
fn share_role(key: &str, from: &str) -> Outcome<String> {
    Ok(match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "function_call" => "assistant",
        "system" => "system",
        "observation" | "tool" | "function" => "tool",
        other => {
            return Err(RowError::Type {
                key: format!("{key}.from"),
                expected: "human, gpt, system, function_call or observation",
                found: format!("{other:?}"),
            });
        }
    }
    .to_string())
}

fn content(key: &str, value: Option<Value>) -> Outcome<Option<String>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (at, part) in parts.iter().enumerate() {
                match (part, part.get("text")) {
                    (Value::String(piece), _) | (_, Some(Value::String(piece))) => text.push_str(piece),
                    _ => return Err(RowError::kind(format!("{key}[{at}]"), "a text part", part)),
                }
            }
            Ok(Some(text))
        }
        Some(other) => Err(RowError::kind(key, "a string or a list of text parts", &other)),
    }
}
