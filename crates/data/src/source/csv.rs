//! Tables in text: a header of column names, then one row a record; quoted cells may hold delimiters and line ends.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{DataError, Location, Result, RowError};

pub(super) fn open(path: Arc<Path>, delimiter: u8) -> Result<impl Iterator<Item = Result<(Location, Value)>>> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .flexible(true)
        .from_path(&path)
        .map_err(|error| fault(&path, 1, error))?;
    let header = reader.byte_headers().map_err(|error| fault(&path, 1, error))?.clone();
    let mut columns: Vec<String> = Vec::with_capacity(header.len());
    for (at, cell) in header.iter().enumerate() {
        let name = std::str::from_utf8(cell)
            .map_err(|_| DataError::file(&path, 1, format!("the name of column {} is not UTF-8", at + 1)))?;
        let name = if at == 0 { name.trim_start_matches('\u{feff}') } else { name }.trim().to_string();
        if columns.contains(&name) {
            return Err(DataError::file(
                &path,
                1,
                format!("two columns are named {name:?}; the first line must name the columns"),
            ));
        }
        columns.push(name);
    }
    let mut records = reader.into_byte_records();
    let mut last = 1;
    Ok(std::iter::from_fn(move || {
        let record = match records.next()? {
            Ok(record) => record,
            Err(error) => return Some(Err(fault(&path, last, error))),
        };
        last = record.position().map_or(last, csv::Position::line);
        let location = Location { file: path.clone(), line: last };
        Some(
            row(&columns, &record)
                .map(|value| (location.clone(), value))
                .map_err(|problem| DataError::Row { location, problem }),
        )
    }))
}

fn row(columns: &[String], record: &csv::ByteRecord) -> std::result::Result<Value, RowError> {
    if record.len() != columns.len() {
        return Err(RowError::Cells { expected: columns.len(), found: record.len() });
    }
    let mut map = Map::new();
    let mut at = 0;
    for (name, cell) in columns.iter().zip(record) {
        let text = std::str::from_utf8(cell).map_err(|error| RowError::Utf8 { at: at + error.valid_up_to() + 1 })?;
        map.insert(name.clone(), Value::String(text.to_string()));
        at += cell.len() + 1;
    }
    Ok(Value::Object(map))
}

fn fault(path: &Path, line: u64, error: csv::Error) -> DataError {
    let line = error.position().map_or(line, csv::Position::line);
    let message = error.to_string();
    match error.into_kind() {
        csv::ErrorKind::Io(source) => DataError::Io { path: path.to_path_buf(), source },
        _ => DataError::file(path, line, message),
    }
}
