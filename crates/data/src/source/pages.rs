//! The page headers of a Parquet file, walked before the reader believes them: it makes room for what a header claims.
//!
//! Source: the Parquet format's `PageHeader` in Thrift's compact protocol

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use parquet::file::metadata::ParquetMetaData;

use crate::error::{DataError, Result};

/// Largest page, and largest dictionary, in bytes when unpacked. Writers aim at one mebibyte.
const LARGEST_PAGE: i64 = 256 << 20;
const LARGEST_DICTIONARY: i64 = 64 << 20;
/// Longest header of a page; the statistics in it hold whole values.
const LONGEST_HEADER: u64 = 1 << 20;
/// Deepest nesting of a header.
const DEEPEST: u32 = 8;

/// What a page's header says.
#[derive(Debug, Default)]
struct Page {
    unpacked: i64,
    packed: i64,
    /// Entries of a dictionary.
    entries: Option<i64>,
}

/// Checks every page of a file whose footer was read.
pub(super) fn check(path: &Path, footer: &ParquetMetaData) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(DataError::io(path))?);
    for (group, rows) in footer.row_groups().iter().enumerate() {
        for column in rows.columns() {
            let name = column.column_path().string();
            let fault = |what: String| {
                DataError::file(path, 1, format!("row group {group}, column {name}: {what}; is the file damaged?"))
            };
            let begin =
                column.dictionary_page_offset().unwrap_or(column.data_page_offset()).min(column.data_page_offset());
            let length = column.compressed_size();
            let (Ok(begin), Ok(length)) = (u64::try_from(begin), u64::try_from(length)) else {
                return Err(fault("an offset or a size is below 0".into()));
            };
            let mut at = 0;
            while at < length {
                reader.seek(SeekFrom::Start(begin.saturating_add(at))).map_err(DataError::io(path))?;
                let mut header = Header { reader: reader.by_ref().take(LONGEST_HEADER), page: Page::default() };
                if header.fields(0, None).is_none() {
                    return Err(fault(format!("no page header at byte {at}")));
                }
                let used = LONGEST_HEADER - header.reader.limit();
                let Page { unpacked, packed, entries } = header.page;
                let largest = if entries.is_some() { LARGEST_DICTIONARY } else { LARGEST_PAGE };
                if !(0..=largest).contains(&unpacked) || !(0..=length as i64).contains(&packed) {
                    return Err(fault(format!(
                        "a page of {packed} bytes, {unpacked} unpacked, where {largest} are read"
                    )));
                }
                if entries.is_some_and(|entries| !(0..=unpacked).contains(&entries)) {
                    return Err(fault(format!("a dictionary of {entries:?} entries in {unpacked} bytes")));
                }
                at = at.saturating_add(used).saturating_add(packed as u64);
            }
        }
    }
    Ok(())
}

/// A reader of one header. None: it is none.
struct Header<R> {
    reader: std::io::Take<R>,
    page: Page,
}

impl<R: Read> Header<R> {
    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.reader.read_exact(&mut byte).ok()?;
        Some(byte[0])
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn integer(&mut self) -> Option<i64> {
        self.varint().map(|n| (n >> 1) as i64 ^ -((n & 1) as i64))
    }

    fn skip(&mut self, bytes: u64) -> Option<()> {
        let skipped = std::io::copy(&mut self.reader.by_ref().take(bytes), &mut std::io::sink()).ok()?;
        (skipped == bytes).then_some(())
    }

    /// The fields of a structure; `within` is the field of the header that it is.
    fn fields(&mut self, depth: u32, within: Option<i64>) -> Option<()> {
        let mut id = 0i64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Some(());
            }
            id = if head >> 4 == 0 { self.integer()? } else { id + i64::from(head >> 4) };
            match (within, id, head & 0x0f) {
                (None, 2, 4..=6) => self.page.unpacked = self.integer()?,
                (None, 3, 4..=6) => self.page.packed = self.integer()?,
                // Field 7 is the header of a dictionary, whose first field counts its entries.
                (Some(7), 1, 4..=6) => self.page.entries = Some(self.integer()?),
                (None, _, 12) if depth < DEEPEST => self.fields(depth + 1, Some(id))?,
                (_, _, kind) => self.value(kind, depth)?,
            }
        }
    }

    /// Passes over a value that is not a field's boolean.
    fn value(&mut self, kind: u8, depth: u32) -> Option<()> {
        if depth > DEEPEST {
            return None;
        }
        match kind {
            1 | 2 => Some(()),
            3 => self.skip(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.skip(8),
            8 => {
                let length = self.varint()?;
                self.skip(length)
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
                let kind = head & 0x0f;
                // Booleans of a list take a byte each.
                (0..count).try_for_each(|_| if kind <= 2 { self.skip(1) } else { self.value(kind, depth + 1) })
            }
            12 => self.fields(depth + 1, Some(-1)),
            _ => None,
        }
    }
}
