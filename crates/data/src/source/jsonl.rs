//! JSON lines: one object a line, blank lines passed over.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::line::Lines;
use crate::error::{DataError, Location, Result, RowError};

pub(super) fn open(path: Arc<Path>) -> Result<impl Iterator<Item = Result<(Location, Value)>>> {
    let mut lines = Lines::open(path)?;
    Ok(std::iter::from_fn(move || next(&mut lines).transpose()))
}

fn next(lines: &mut Lines) -> Result<Option<(Location, Value)>> {
    while lines.advance()? {
        let text = lines.text()?;
        if text.trim().is_empty() {
            continue;
        }
        let location = lines.location();
        return match serde_json::from_str(text) {
            Ok(value) => Ok(Some((location, value))),
            Err(error) => {
                let detail = error.to_string();
                let detail = detail.split(" at line ").next().unwrap_or(&detail).to_string();
                let problem = RowError::Json(format!("{detail} at column {} of {}", error.column(), text.len()));
                Err(DataError::Row { location, problem })
            }
        };
    }
    Ok(None)
}
