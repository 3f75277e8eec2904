//! Questions with choices, read from records of several layouts.
//!
//! A choice list is a list of strings, or an object of `text` and `label` lists (ARC). The answer is an index from 0, a
//! letter from A, one of the labels, or the text of a choice. A record whose other columns (`context`, `hint`, ...) carry
//! something that would be lost is refused unless the columns are named.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A question with its choices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChoiceRow {
    /// What stands before each choice.
    pub prompt: String,
    /// The choices, at least two.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// Columns to read; those not named are found by their usual names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChoiceColumns {
    /// Column with the text before the choices, used as it is.
    pub prompt: Option<String>,
    /// Column with the choices.
    pub choices: Option<String>,
    /// Column with the answer.
    pub answer: Option<String>,
}

/// Names of the prompt; a `question` becomes "Question: ..\nAnswer:", the others are used as they are.
const PROMPTS: [&str; 5] = ["prompt", "question", "query", "goal", "ctx"];
const CHOICES: [&str; 3] = ["choices", "options", "endings"];
const ANSWERS: [&str; 5] = ["answer", "answerKey", "label", "gold", "answer_index"];
/// Columns that belong to a question and would be lost.
const CONTEXTS: [&str; 6] = ["context", "contexts", "passage", "hint", "support", "image"];

impl ChoiceRow {
    /// The question that a record of named columns means.
    ///
    /// # Errors
    /// Says which column is missing or of the wrong kind, and what the record has.
    pub fn from_value(value: &Value, columns: &ChoiceColumns) -> std::result::Result<Self, String> {
        let map = value.as_object().ok_or("a row must be an object with named keys")?;
        let named = |column: &Option<String>, names: &[&str], what: &str| -> std::result::Result<String, String> {
            match column {
                Some(column) if is_filled(map, column) => Ok(column.clone()),
                Some(column) => Err(format!("column {column:?} is absent or null; the row has [{}]", keys(map))),
                None => names.iter().find(|name| is_filled(map, name)).map(|name| name.to_string()).ok_or_else(|| {
                    format!("no {what} ({}); the row has [{}]; name the column", names.join(", "), keys(map))
                }),
            }
        };
        let prompt_key = named(&columns.prompt, &PROMPTS, "prompt")?;
        let choices_key = named(&columns.choices, &CHOICES, "choices")?;
        let answer_key = named(&columns.answer, &ANSWERS, "answer")?;
        if columns.prompt.is_none()
            && let Some(lost) = CONTEXTS.iter().find(|key| is_filled(map, key))
        {
            return Err(format!(
                "{prompt_key} comes with {lost:?}, which would be lost; fold it into one column and name that as prompt"
            ));
        }
        let text = map.get(&prompt_key).and_then(Value::as_str).ok_or(format!("{prompt_key}: expected a string"))?;
        let prompt = match (columns.prompt.is_none(), prompt_key.as_str()) {
            (true, "question") => format!("Question: {}\nAnswer:", text.trim()),
            _ => text.to_owned(),
        };
        let (choices, labels) = choices(&choices_key, map.get(&choices_key).unwrap_or(&Value::Null))?;
        let answer = answer(&answer_key, map.get(&answer_key).unwrap_or(&Value::Null), &choices, labels.as_deref())?;
        Ok(Self { prompt, choices, answer })
    }
}

fn is_filled(map: &Map<String, Value>, key: &str) -> bool {
    match map.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.trim().is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        Some(_) => true,
    }
}

fn keys(map: &Map<String, Value>) -> String {
    map.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn strings(key: &str, value: &Value) -> std::result::Result<Vec<String>, String> {
    let list = value.as_array().ok_or(format!("{key}: expected a list of strings"))?;
    list.iter()
        .enumerate()
        .map(|(at, item)| match item {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            _ => Err(format!("{key}[{at}]: expected a string")),
        })
        .collect()
}

/// The choices and their labels, where they have some.
fn choices(key: &str, value: &Value) -> std::result::Result<(Vec<String>, Option<Vec<String>>), String> {
    let (choices, labels) = match value {
        Value::Object(map) => {
            let texts =
                map.get("text").ok_or(format!("{key}: expected a list, or an object of text and label lists"))?;
            let labels = map.get("label").map(|labels| strings(&format!("{key}.label"), labels)).transpose()?;
            (strings(&format!("{key}.text"), texts)?, labels)
        }
        other => (strings(key, other)?, None),
    };
    if choices.len() < 2 {
        return Err(format!("{key}: {} choices, at least 2 are needed", choices.len()));
    }
    match &labels {
        Some(labels) if labels.len() != choices.len() => {
            Err(format!("{key}: {} labels for {} choices", labels.len(), choices.len()))
        }
        _ => Ok((choices, labels)),
    }
}

fn answer(
    key: &str,
    value: &Value,
    choices: &[String],
    labels: Option<&[String]>,
) -> std::result::Result<usize, String> {
    let n = choices.len();
    let outside =
        || format!("{key}: {value} is no answer to {n} choices (an index from 0, a letter from A, or a choice)");
    let text = match value {
        Value::Number(number) => {
            return number.as_u64().and_then(|i| usize::try_from(i).ok()).filter(|i| *i < n).ok_or_else(outside);
        }
        Value::Bool(yes) => return Ok(usize::from(*yes)),
        Value::String(text) => text.trim(),
        _ => return Err(outside()),
    };
    if let Some(at) = labels.and_then(|labels| labels.iter().position(|label| label == text)) {
        return Ok(at);
    }
    let letter = match text.as_bytes() {
        [byte @ b'A'..=b'Z'] => Some(usize::from(byte - b'A')),
        _ => None,
    };
    let meant = [
        letter.filter(|i| *i < n),
        choices.iter().position(|choice| choice.trim() == text),
        text.parse().ok().filter(|i| *i < n),
    ];
    let mut meant = meant.into_iter().flatten();
    let first = meant.next().ok_or_else(outside)?;
    match meant.find(|other| *other != first) {
        Some(other) => {
            Err(format!("{key}: {value} may mean choice {first} or choice {other}; give the index as a number"))
        }
        None => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use serde_json::json;

    fn read(value: Value) -> std::result::Result<ChoiceRow, String> {
        ChoiceRow::from_value(&value, &ChoiceColumns::default())
    }

    #[test]
    fn usual_layouts_are_read() {
        let mmlu =
            read(json!({"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": "B", "subject": "x"})).unwrap();
        assert_eq!(mmlu.prompt, "Question: 1 + 1?\nAnswer:");
        assert_eq!(mmlu.answer, 1);
        let arc = json!({"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"});
        assert_eq!(read(arc).unwrap().answer, 1);
        assert_eq!(read(json!({"ctx": "He", "endings": ["x", "y"], "label": "1"})).unwrap().answer, 1);
        assert_eq!(read(json!({"prompt": "p", "choices": ["x", "y"], "answer": 0})).unwrap().answer, 0);
        assert_eq!(read(json!({"prompt": "p", "options": ["red", "blue"], "answer": "blue"})).unwrap().answer, 1);
    }

    #[test]
    fn records_that_cannot_be_meant_say_why() {
        let fails = |value: Value, part: &str| {
            let message = read(value).unwrap_err();
            assert!(message.contains(part), "{message}");
        };
        fails(json!([]), "object");
        fails(json!({"choices": ["a", "b"], "answer": 0}), "no prompt");
        fails(json!({"prompt": "p", "answer": 0}), "no choices");
        fails(json!({"prompt": "p", "choices": ["a"], "answer": 0}), "at least 2");
        fails(json!({"prompt": "p", "choices": ["a", "b"], "answer": 2}), "2 is no answer to 2 choices");
        fails(json!({"prompt": "p", "choices": ["a", "b"], "answer": "C"}), "no answer");
        fails(json!({"prompt": "p", "choices": ["a", {}], "answer": 0}), "choices[1]");
        fails(json!({"prompt": "p", "choices": ["1", "0"], "answer": "0"}), "choice 1 or choice 0");
        fails(json!({"question": "q", "hint": "h", "choices": ["a", "b"], "answer": "A"}), "hint");
        fails(json!({"prompt": 3, "choices": ["a", "b"], "answer": "A"}), "expected a string");
    }

    #[test]
    fn named_columns_are_used_as_they_are() {
        let columns = ChoiceColumns { prompt: Some("text".into()), ..ChoiceColumns::default() };
        let value = json!({"text": "T ", "hint": "h", "choices": ["a", "b"], "answer": "A"});
        assert_eq!(ChoiceRow::from_value(&value, &columns).unwrap().prompt, "T ");
        let columns = ChoiceColumns { answer: Some("gone".into()), ..ChoiceColumns::default() };
        assert!(
            ChoiceRow::from_value(&json!({"prompt": "p", "choices": ["a", "b"]}), &columns)
                .unwrap_err()
                .contains("gone")
        );
    }
}
