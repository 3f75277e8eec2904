//! Apache Parquet by its record interface: one row group's pages at a time, columns of text, numbers, lists and groups.
//!
//! Columns of bytes that are not text (images) are read as null. A damaged file must not end the process: the reader's
//! own assertions are caught and reported as errors, and its pages are looked at before it makes room for them.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

use crate::error::{DataError, Location, Result};

pub(super) fn open(path: Arc<Path>) -> Result<impl Iterator<Item = Result<(Location, Value)>>> {
    let file = File::open(&path).map_err(DataError::io(&path))?;
    let damaged = || DataError::file(&path, 1, "the Parquet footer is damaged");
    let reader = match catch_unwind(AssertUnwindSafe(|| SerializedFileReader::new(file))) {
        Ok(Ok(reader)) => reader,
        Ok(Err(error)) => return Err(DataError::file(&path, 1, format!("not a whole Parquet file: {error}"))),
        Err(_) => return Err(damaged()),
    };
    super::pages::check(&path, reader.metadata())?;
    let rows = catch_unwind(AssertUnwindSafe(|| RowIter::from_file_into(Box::new(reader))));
    let mut rows = rows.map_err(|_| damaged())?;
    let (mut line, mut ended) = (0, false);
    Ok(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        line += 1;
        let next = catch_unwind(AssertUnwindSafe(|| rows.next().map(|row| row.map(|row| object(&row)))));
        let fault = match next {
            Ok(None) => return None,
            Ok(Some(Ok(value))) => return Some(Ok((Location { file: path.clone(), line }, value))),
            Ok(Some(Err(error))) => format!("cannot read this row: {error}"),
            Err(_) => "cannot read this row: the page is damaged or a column has an unsupported type".to_string(),
        };
        ended = true;
        Some(Err(DataError::file(&path, line, fault)))
    }))
}

fn object(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
}

fn value(field: &Field) -> Value {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(b) => Value::Bool(*b),
        Field::Byte(n) => Value::from(*n),
        Field::Short(n) => Value::from(*n),
        Field::Int(n) => Value::from(*n),
        Field::Long(n) => Value::from(*n),
        Field::UByte(n) => Value::from(*n),
        Field::UShort(n) => Value::from(*n),
        Field::UInt(n) => Value::from(*n),
        Field::ULong(n) => Value::from(*n),
        Field::Float16(x) => float(f64::from(*x)),
        Field::Float(x) => float(f64::from(*x)),
        Field::Double(x) => float(*x),
        Field::Str(text) => Value::String(text.clone()),
        Field::Bytes(bytes) => {
            std::str::from_utf8(bytes.data()).map_or(Value::Null, |text| Value::String(text.to_string()))
        }
        Field::Group(row) => object(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        Field::MapInternal(map) => {
            let mut out = Map::new();
            for (key, item) in map.entries() {
                let key = match key {
                    Field::Str(text) => text.clone(),
                    other => other.to_string(),
                };
                out.insert(key, value(item));
            }
            Value::Object(out)
        }
        other => Value::String(other.to_string()),
    }
}
