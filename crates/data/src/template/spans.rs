//! Which bytes of a rendered conversation are trained.
//!
//! With generation marks: what lies between them. Without: assistant message i begins where the rendering of the messages
//! before it with an opened turn ends, and ends where the rendering up to it ends; both must be beginnings of the whole.
//! The end-of-turn mark is trained with the message; white space after that mark is not. Where earlier turns are written otherwise
//! once others follow, the last one is still a continuation of what comes before it, and is trained alone.

use std::ops::Range;

use serde_json::Value;

use crate::error::RowError;
use crate::row::Message;

type Outcome<T> = std::result::Result<T, RowError>;

/// Two private-use characters that the conversation does not contain.
pub(super) fn unused_marks(views: &[Value], tools: Option<&Value>) -> Option<(char, char)> {
    let mut used = std::collections::BTreeSet::new();
    for value in views.iter().chain(tools) {
        collect(value, &mut used);
    }
    let mut free = ('\u{E000}'..='\u{F8FF}').filter(|c| !used.contains(c));
    Some((free.next()?, free.next()?))
}

fn collect(value: &Value, used: &mut std::collections::BTreeSet<char>) {
    let mut add = |text: &str| used.extend(text.chars().filter(|c| ('\u{E000}'..='\u{F8FF}').contains(c)));
    match value {
        Value::String(text) => add(text),
        Value::Array(list) => list.iter().for_each(|item| collect(item, used)),
        Value::Object(map) => {
            map.keys().for_each(|key| add(key));
            map.values().for_each(|item| collect(item, used));
        }
        _ => {}
    }
}

/// Takes the marks out of a rendering.
pub(super) fn strip(text: &str, open: char, close: char) -> Outcome<(String, Vec<Range<usize>>)> {
    let mut out = String::with_capacity(text.len());
    let mut spans = Vec::new();
    let mut start = None;
    for c in text.chars() {
        if c == open && start.is_none() {
            start = Some(out.len());
        } else if c == close && start.is_some() {
            spans.push(start.take().unwrap_or_default()..out.len());
        } else if c == open || c == close {
            return Err(RowError::Template("generation blocks are nested or cut apart".into()));
        } else {
            out.push(c);
        }
    }
    if start.is_some() {
        return Err(RowError::Template("a generation block is not closed".into()));
    }
    Ok((out, spans))
}

/// Marked spans, less those of messages with weight 0.
pub(super) fn from_marks(messages: &[Message], marks: Vec<Range<usize>>) -> Outcome<Vec<Range<usize>>> {
    let turns: Vec<&Message> = messages.iter().filter(|m| m.role == "assistant").collect();
    if turns.iter().all(|m| m.is_trained()) {
        return Ok(marks);
    }
    if turns.len() != marks.len() {
        return Err(RowError::Template(format!(
            "{} assistant messages but {} generation blocks, so that weight = 0 cannot be applied",
            turns.len(),
            marks.len()
        )));
    }
    Ok(turns.iter().zip(marks).filter(|(m, _)| m.is_trained()).map(|(_, span)| span).collect())
}

/// Spans from renderings of the first messages, and whether they are of all trained turns: `prefix(count, open)` renders
/// `count` messages, with a turn opened or not. A template that writes a past turn otherwise than it was said (reasoning taken
/// out, a system text moved) leaves only the last trained turn as the model will say it; then that one alone is trained.
pub(super) fn from_prefixes(
    messages: &[Message],
    whole: &str,
    prefix: impl Fn(usize, bool) -> Outcome<String>,
) -> Outcome<(Vec<Range<usize>>, bool)> {
    let turns: Vec<(usize, &Message)> = messages.iter().enumerate().filter(|(_, m)| m.is_trained()).collect();
    let span = |(turn, message): &(usize, &Message)| said(*turn, message, whole, &prefix);
    match (turns.iter().map(span).collect::<Outcome<Vec<_>>>(), turns.split_last()) {
        (Err(error @ RowError::Spans { .. }), Some((last, [_, ..]))) => match span(last) {
            Ok(span) => Ok((vec![span], false)),
            Err(_) => Err(error),
        },
        (spans, _) => spans.map(|spans| (spans, true)),
    }
}

/// What is trained of message number `turn`.
fn said(
    turn: usize,
    message: &Message,
    whole: &str,
    prefix: &impl Fn(usize, bool) -> Outcome<String>,
) -> Outcome<Range<usize>> {
    let start = beginning(&prefix(turn, true)?, whole)
        .map_err(|detail| RowError::Spans { turn, detail: format!("with the turn opened: {detail}") })?;
    let end = beginning(&prefix(turn + 1, false)?, whole)
        .map_err(|detail| RowError::Spans { turn, detail: format!("with the message: {detail}") })?;
    if end < start {
        return Err(RowError::Spans { turn, detail: "the opened turn is longer than the message".into() });
    }
    let said = whole.get(start..end).unwrap_or_default();
    Ok(start..start + without_tail(said, message.content.trim()))
}

/// Length of a trained text without the white space behind its end-of-turn mark. Where white space itself is all that ends
/// the turn, it stays.
fn without_tail(said: &str, content: &str) -> usize {
    let after = if content.is_empty() { 0 } else { said.find(content).map_or(0, |at| at + content.len()) };
    let tail = said.get(after..).unwrap_or_default();
    if tail.trim().is_empty() { said.len() } else { said.trim_end().len() }
}

fn beginning(part: &str, whole: &str) -> Result<usize, String> {
    if whole.starts_with(part) {
        return Ok(part.len());
    }
    let same = part.chars().zip(whole.chars()).take_while(|(a, b)| a == b).count();
    let show = |text: &str| text.chars().skip(same).take(30).collect::<String>();
    Err(format!("character {same} on, {:?} against {:?}", show(part), show(whole)))
}
