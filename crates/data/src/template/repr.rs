//! Lists and dictionaries as Python writes them: what `{{ message.tool_calls }}` or `| string` gives under Jinja.

use minijinja::value::ValueKind;
use minijinja::{Error, Output, State, Value, escape_formatter};

use super::meter;

/// Writes an expression's value: containers in Python's spelling, all else as the engine does.
pub(super) fn format(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    meter::spend_text(state, value)?;
    match container(value) {
        Some(text) => out.write_str(&text).map_err(Error::from),
        None => escape_formatter(out, state, value),
    }
}

/// The filter `string`.
pub(super) fn string(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    meter::spend_text(state, value)?;
    Ok(container(value).unwrap_or_else(|| value.to_string()))
}

fn container(value: &Value) -> Option<String> {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
        return None;
    }
    let mut out = String::new();
    write(&serde_json::to_value(value).ok()?, &mut out);
    Some(out)
}

fn write(value: &serde_json::Value, out: &mut String) {
    use serde_json::Value as Json;
    match value {
        Json::Null => out.push_str("None"),
        Json::Bool(true) => out.push_str("True"),
        Json::Bool(false) => out.push_str("False"),
        Json::Number(number) => out.push_str(&number.to_string()),
        Json::String(text) => quote(text, out),
        Json::Array(list) => {
            out.push('[');
            for (at, item) in list.iter().enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                write(item, out);
            }
            out.push(']');
        }
        Json::Object(map) => {
            out.push('{');
            for (at, (key, item)) in map.iter().enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                quote(key, out);
                out.push_str(": ");
                write(item, out);
            }
            out.push('}');
        }
    }
}

/// Single quotes, unless the text has those and no double ones.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(mark);
}
