//! Lines of a file as bytes, numbered from 1, without line ends and without a byte order mark.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use crate::error::{DataError, Location, Result, RowError};

pub(super) struct Lines {
    path: Arc<Path>,
    reader: BufReader<File>,
    line: u64,
    buffer: Vec<u8>,
}

impl Lines {
    pub(super) fn open(path: Arc<Path>) -> Result<Self> {
        let file = File::open(&path).map_err(DataError::io(&path))?;
        Ok(Self { path, reader: BufReader::with_capacity(1 << 16, file), line: 0, buffer: Vec::new() })
    }

    /// Where the line last read is.
    pub(super) fn location(&self) -> Location {
        self.at(self.line)
    }

    pub(super) fn at(&self, line: u64) -> Location {
        Location { file: self.path.clone(), line }
    }

    /// Reads the next line; false at the end of the file.
    pub(super) fn advance(&mut self) -> Result<bool> {
        self.buffer.clear();
        let n = self.reader.read_until(b'\n', &mut self.buffer).map_err(DataError::io(&self.path))?;
        if n == 0 {
            return Ok(false);
        }
        self.line += 1;
        if self.buffer.last() == Some(&b'\n') {
            self.buffer.pop();
            if self.buffer.last() == Some(&b'\r') {
                self.buffer.pop();
            }
        }
        if self.line == 1 && self.buffer.starts_with(b"\xEF\xBB\xBF") {
            self.buffer.drain(..3);
        }
        Ok(true)
    }

    /// The line last read.
    pub(super) fn text(&self) -> Result<&str> {
        std::str::from_utf8(&self.buffer).map_err(|error| DataError::Row {
            location: self.location(),
            problem: RowError::Utf8 { at: error.valid_up_to() + 1 },
        })
    }
}
