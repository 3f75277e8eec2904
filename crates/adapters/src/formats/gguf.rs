//! The header of a GGUF file, checked before it is believed: every count, size and offset against the length of the file, with
//! arithmetic that cannot overflow. What passes is then read by the tensor library.
//!
//! Source: the GGUF specification of ggml, versions 1 to 3

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use crate::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const MOST_DIMENSIONS: u32 = 4;
const DEEPEST: usize = 8;
const LONGEST_NAME: u64 = 1 << 16;

const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a value of a fixed size.
fn value_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        U32 | 5 | 6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Values and bytes of one block of a tensor type that is read here.
fn block(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
        0 => (1, 4),
        1 | 30 => (1, 2),
        2 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        10 => (256, 84),
        11 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        _ => return None,
    })
}

/// Opens a GGUF file after its header was checked.
///
/// # Errors
/// If the file cannot be read, or a field of its header is not what the format or the file's length allow; names the field.
pub fn open(path: &Path) -> Result<(Content, BufReader<File>)> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let mut reader = BufReader::new(file);
    Header { path, reader: &mut reader, at: 0, length, wide: true }.check()?;
    reader.seek(SeekFrom::Start(0)).map_err(|e| Error::io(path, e))?;
    let content = Content::read(&mut reader).map_err(|e| Error::format(path, format!("not a GGUF file: {e}")))?;
    Ok((content, reader))
}

/// A walk over the header; `at` is the place in bytes.
struct Header<'a> {
    path: &'a Path,
    reader: &'a mut BufReader<File>,
    at: u64,
    length: u64,
    /// Whether counts are of 64 bits (since version 2).
    wide: bool,
}

/// A tensor's place in the file, in bytes behind the header.
struct Extent {
    name: String,
    offset: u64,
    bytes: u64,
}

impl Header<'_> {
    fn wrong(&self, field: &str, message: impl std::fmt::Display) -> Error {
        Error::format(self.path, format!("not a valid GGUF file: {field}: {message}"))
    }

    fn left(&self) -> u64 {
        self.length.saturating_sub(self.at)
    }

    fn fixed<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        if self.left() < N as u64 {
            return Err(self.wrong(field, format!("the file is truncated at byte {}", self.at)));
        }
        self.reader.read_exact(&mut bytes).map_err(|e| Error::io(self.path, e))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, field: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.fixed(field)?))
    }

    fn count(&mut self, field: &str) -> Result<u64> {
        match self.wide {
            true => Ok(u64::from_le_bytes(self.fixed(field)?)),
            false => Ok(u64::from(self.u32(field)?)),
        }
    }

    /// Leaves out `bytes`, which must be there.
    fn skip(&mut self, bytes: u64, field: &str) -> Result<()> {
        if bytes > self.left() {
            return Err(self.wrong(field, format!("{bytes} bytes are said to follow, {} do", self.left())));
        }
        // Not above the length of a file, so within i64.
        self.reader.seek_relative(bytes as i64).map_err(|e| Error::io(self.path, e))?;
        self.at += bytes;
        Ok(())
    }

    fn name(&mut self, field: &str) -> Result<String> {
        let length = self.count(field)?;
        if length > LONGEST_NAME || length > self.left() {
            return Err(self.wrong(field, format!("a name of {length} bytes")));
        }
        let mut bytes = vec![0; length as usize];
        self.reader.read_exact(&mut bytes).map_err(|e| Error::io(self.path, e))?;
        self.at += length;
        String::from_utf8(bytes).map_err(|_| self.wrong(field, "the name is not UTF-8"))
    }

    fn value(&mut self, kind: u32, field: &str, depth: usize) -> Result<()> {
        match (kind, value_size(kind)) {
            (7, _) => match self.fixed::<1>(field)?[0] {
                0 | 1 => Ok(()),
                other => Err(self.wrong(field, format!("{other} is no truth value"))),
            },
            (_, Some(size)) => self.skip(size, field),
            (STRING, _) => {
                let length = self.count(field)?;
                self.skip(length, field)
            }
            (ARRAY, _) if depth < DEEPEST => {
                let kind = self.u32(field)?;
                let n = self.count(field)?;
                match value_size(kind).filter(|_| kind != 7) {
                    Some(size) => {
                        let too_many = || self.wrong(field, format!("an array of {n} values"));
                        let bytes = n.checked_mul(size).ok_or_else(too_many)?;
                        self.skip(bytes, field)
                    }
                    // Each takes at least a byte, so the file's end is met before the count is.
                    None if n <= self.left() => (0..n).try_for_each(|_| self.value(kind, field, depth + 1)),
                    None => Err(self.wrong(field, format!("an array of {n} values in {} bytes", self.left()))),
                }
            }
            (ARRAY, _) => Err(self.wrong(field, "arrays within arrays without end")),
            (other, _) => Err(self.wrong(field, format!("value type {other} is not known"))),
        }
    }

    fn alignment(&mut self, kind: u32) -> Result<u64> {
        const FIELD: &str = "general.alignment";
        if kind != U32 {
            return Err(self.wrong(FIELD, format!("value type {kind}, expected a 32-bit number")));
        }
        let alignment = u64::from(self.u32(FIELD)?);
        if !alignment.is_power_of_two() {
            return Err(self.wrong(FIELD, format!("{alignment} is no power of two")));
        }
        Ok(alignment)
    }

    fn tensor(&mut self, name: &str, alignment: u64) -> Result<Extent> {
        let field = format!("tensor `{name}`");
        let n = self.u32(&field)?;
        if n == 0 || n > MOST_DIMENSIONS {
            return Err(self.wrong(&field, format!("{n} dimensions, expected 1 to {MOST_DIMENSIONS}")));
        }
        let dims = (0..n).map(|_| self.count(&field)).collect::<Result<Vec<u64>>>()?;
        let kind = self.u32(&field)?;
        let offset = u64::from_le_bytes(self.fixed(&field)?);
        let Some((values, size)) = block(kind) else {
            return Err(self.wrong(&field, format!("tensor type {kind} is not read here")));
        };
        let elements = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n > 0);
        let bytes = elements.and_then(|n| (n / values).checked_mul(size)).filter(|n| *n <= self.length);
        let Some(bytes) = bytes else {
            return Err(self.wrong(&field, format!("shape {dims:?} does not fit into a file of {} bytes", self.length)));
        };
        if dims[0] % values != 0 {
            return Err(self.wrong(&field, format!("rows of {} values are no whole blocks of {values}", dims[0])));
        }
        if offset % alignment != 0 {
            return Err(self.wrong(&field, format!("offset {offset} is no multiple of the alignment {alignment}")));
        }
        Ok(Extent { name: name.to_owned(), offset, bytes })
    }

    fn check(mut self) -> Result<()> {
        let magic: [u8; 4] = self.fixed("magic")?;
        if &magic != MAGIC {
            return Err(self.wrong("magic", format!("the file begins with {magic:?}, not with `GGUF`")));
        }
        let version = self.u32("version")?;
        if !(1..=3).contains(&version) {
            return Err(self.wrong("version", format!("{version} is not read here (known: 1, 2, 3)")));
        }
        self.wide = version > 1;
        let tensors = self.count("tensor_count")?;
        let pairs = self.count("metadata_kv_count")?;
        for (field, n) in [("tensor_count", tensors), ("metadata_kv_count", pairs)] {
            if n > self.left() {
                return Err(self.wrong(field, format!("{n} entries in {} bytes", self.left())));
            }
        }
        let mut alignment = DEFAULT_ALIGNMENT;
        let mut seen = BTreeSet::new();
        for i in 0..pairs {
            let key = self.name(&format!("metadata key {i}"))?;
            let kind = self.u32(&key)?;
            match key.as_str() {
                "general.alignment" => alignment = self.alignment(kind)?,
                _ => self.value(kind, &key, 0)?,
            }
            if !seen.insert(key.clone()) {
                return Err(self.wrong(&key, "the key is there twice"));
            }
        }
        seen.clear();
        let mut extents = Vec::new();
        for i in 0..tensors {
            let name = self.name(&format!("name of tensor {i}"))?;
            extents.push(self.tensor(&name, alignment)?);
            if !seen.insert(name.clone()) {
                return Err(self.wrong(&format!("tensor `{name}`"), "it is there twice"));
            }
        }
        let data = self.at.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        extents.sort_by_key(|e| e.offset);
        let mut end = 0;
        for Extent { name, offset, bytes } in &extents {
            let field = format!("tensor `{name}`");
            if *offset < end {
                return Err(self.wrong(&field, format!("offset {offset} lies within another tensor")));
            }
            end = offset.checked_add(*bytes).unwrap_or(u64::MAX);
            if data.checked_add(end).is_none_or(|n| n > self.length) {
                let have = self.length.saturating_sub(data);
                return Err(self.wrong(&field, format!("it ends at byte {end} of the data, of which {have} are there")));
            }
        }
        Ok(())
    }
}
