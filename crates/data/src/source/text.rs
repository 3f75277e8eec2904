//! Plain text: a row is a line, a paragraph or the whole file.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::TextUnit;
use super::line::Lines;
use crate::error::{Location, Result};

pub(super) fn open(
    path: Arc<Path>,
    unit: TextUnit,
    separator: Option<String>,
) -> Result<impl Iterator<Item = Result<(Location, Value)>>> {
    let mut lines = Lines::open(path)?;
    Ok(std::iter::from_fn(move || next(&mut lines, unit, separator.as_deref()).transpose()))
}

fn next(lines: &mut Lines, unit: TextUnit, separator: Option<&str>) -> Result<Option<(Location, Value)>> {
    let mut text = String::new();
    let mut first = 0;
    let mut fault = None;
    while lines.advance()? {
        let at = lines.location().line;
        let line = match lines.text() {
            Ok(line) => line,
            Err(error) => {
                // The row is lost as a whole, not only from here on.
                first = at;
                fault.get_or_insert(error);
                if unit == TextUnit::Line {
                    break;
                }
                continue;
            }
        };
        let ends = match (unit, separator) {
            (TextUnit::File, _) | (TextUnit::Line, None) => false,
            (_, Some(separator)) => line.trim() == separator,
            (TextUnit::Paragraph, None) => line.trim().is_empty(),
        };
        if ends {
            if text.is_empty() && fault.is_none() {
                continue;
            }
            break;
        }
        if text.is_empty() {
            if line.trim().is_empty() {
                continue;
            }
            first = at;
        } else {
            text.push('\n');
        }
        text.push_str(line);
        if unit == TextUnit::Line {
            break;
        }
    }
    if let Some(fault) = fault {
        return Err(fault);
    }
    if text.is_empty() {
        return Ok(None);
    }
    if unit != TextUnit::Line {
        text.truncate(text.trim_end_matches('\n').len());
    }
    let mut map = Map::new();
    map.insert("text".into(), Value::String(text));
    Ok(Some((lines.at(first), Value::Object(map))))
}
