//! JSON files: a list of objects, or objects one after the other, taken apart element by element.
//!
//! A scanner finds where each element ends (brackets and strings only) and hands its bytes to the parser, so that a file
//! of any size needs the memory of its largest element. A fault inside an element is that row's; a fault between elements,
//! or the end of the file inside one, ends the reading.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::error::{DataError, Location, Result, RowError};

pub(super) fn open(path: Arc<Path>) -> Result<impl Iterator<Item = Result<(Location, Value)>>> {
    let file = File::open(&path).map_err(DataError::io(&path))?;
    let mut elements = Elements { path, reader: BufReader::with_capacity(1 << 16, file), line: 1, state: State::Start };
    Ok(std::iter::from_fn(move || {
        let item = elements.next();
        if matches!(&item, Err(error) if !matches!(error, DataError::Row { .. })) {
            elements.state = State::Done;
        }
        item.transpose()
    }))
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Start,
    /// In a list; whether an element has been read.
    List(bool),
    /// Objects one after the other.
    Sequence,
    Done,
}

struct Elements {
    path: Arc<Path>,
    reader: BufReader<File>,
    line: u64,
    state: State,
}

impl Elements {
    fn next(&mut self) -> Result<Option<(Location, Value)>> {
        if self.state == State::Start {
            if self.reader.fill_buf().map_err(DataError::io(&self.path))?.starts_with(b"\xEF\xBB\xBF") {
                self.reader.consume(3);
            }
            self.state = match self.peek_solid()? {
                None => State::Done,
                Some(b'[') => {
                    self.reader.consume(1);
                    State::List(false)
                }
                Some(b'{') => State::Sequence,
                Some(other) => {
                    return Err(self.fault(format!("a JSON file must begin with [ or {{, not {:?}", char::from(other))));
                }
            };
        }
        match self.state {
            State::Start | State::Done => return Ok(None),
            State::Sequence => match self.peek_solid()? {
                None => return Ok(None),
                Some(b'{') => {}
                Some(other) => {
                    return Err(self.fault(format!("expected the next object, found {:?}", char::from(other))));
                }
            },
            State::List(begun) => {
                let mut next = self.peek_solid()?;
                if next == Some(b']') {
                    self.reader.consume(1);
                    self.state = State::Done;
                    return match self.peek_solid()? {
                        None => Ok(None),
                        Some(other) => Err(self.fault(format!("{:?} behind the end of the list", char::from(other)))),
                    };
                }
                if begun {
                    if next == Some(b',') {
                        self.reader.consume(1);
                        next = self.peek_solid()?;
                    } else if let Some(other) = next {
                        return Err(self.fault(format!("expected , or ] between rows, found {:?}", char::from(other))));
                    }
                }
                match next {
                    Some(b',' | b']') => return Err(self.fault("a comma without a row behind it".into())),
                    None => return Err(self.fault("the file ends before the ] of the list: it is truncated".into())),
                    Some(_) => self.state = State::List(true),
                }
            }
        }
        let line = self.line;
        let mut bytes = Vec::new();
        if !self.element(&mut bytes)? {
            let message = format!(
                "the file ends inside the row that begins on line {line}: it is truncated or a bracket is missing"
            );
            return Err(DataError::file(&self.path, line, message));
        }
        let location = Location { file: self.path.clone(), line };
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some((location, value))),
            Err(error) => {
                let problem = match std::str::from_utf8(&bytes) {
                    Err(utf8) => RowError::Utf8 { at: utf8.valid_up_to() + 1 },
                    Ok(_) => RowError::Json(error.to_string()),
                };
                Err(DataError::Row { location, problem })
            }
        }
    }

    fn fault(&self, message: String) -> DataError {
        DataError::file(&self.path, self.line, message)
    }

    /// The next byte that is not white space, left in place.
    fn peek_solid(&mut self) -> Result<Option<u8>> {
        loop {
            let buffer = self.reader.fill_buf().map_err(DataError::io(&self.path))?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let blank = buffer.iter().take_while(|b| b.is_ascii_whitespace()).count();
            self.line += buffer.iter().take(blank).filter(|b| **b == b'\n').count() as u64;
            let next = buffer.get(blank).copied();
            self.reader.consume(blank);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    /// Moves one element into `out`; false where the file ends first.
    fn element(&mut self, out: &mut Vec<u8>) -> Result<bool> {
        let (mut depth, mut in_string, mut escaped) = (0i64, false, false);
        loop {
            let buffer = self.reader.fill_buf().map_err(DataError::io(&self.path))?;
            if buffer.is_empty() {
                return Ok(false);
            }
            let (mut used, mut done) = (0, false);
            for &byte in buffer {
                let bare = depth == 0 && !in_string;
                if bare
                    && !out.is_empty() | (used > 0)
                    && (matches!(byte, b',' | b']' | b'}') || byte.is_ascii_whitespace())
                {
                    // A scalar ends before the byte that follows it.
                    done = true;
                    break;
                }
                used += 1;
                if byte == b'\n' {
                    self.line += 1;
                }
                if in_string {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => in_string = false,
                        _ => {}
                    }
                } else {
                    match byte {
                        b'"' => in_string = true,
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => {
                            depth -= 1;
                            if depth <= 0 {
                                done = true;
                                break;
                            }
                        }
                        _ => {}
                    }
                }
            }
            out.extend_from_slice(buffer.get(..used).unwrap_or_default());
            self.reader.consume(used);
            if done {
                return Ok(true);
            }
        }
    }
}
