//! Encoded examples of one pass over the data, in one flat file opened by memory map, or in memory where small.
//!
//! Layout: for each example its ids `[t]` u32 and labels `[t]` i32; then one [`RECORD`] of 40 bytes an example (offset u64,
//! tokens u32, class u32 with `u32::MAX` for none, line u64, file u32, trained tokens u32, and the first 8 bytes of the
//! SHA-256 over its ids, its labels and the record so far); then the footer as JSON, its
//! length u64, SHA-256 of all before, and the mark. All numbers are little-endian. Memory does not grow with the data.

mod build;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use build::cache_key;

use crate::encode::{Example, IGNORE};
use crate::error::{DataError, Result};

const MARK: &[u8; 8] = b"ESPTOK02";
const RECORD: usize = 40;
/// Bytes of a record before its checksum.
const FACTS: usize = 32;
/// Footer length, checksum and mark.
const TAIL: usize = 8 + 32 + 8;

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rows read.
    pub rows: u64,
    /// Rows that became examples.
    pub used: u64,
    /// Rows that did not, by reason: bad ones that were passed over and those with nothing to train.
    pub refused: BTreeMap<String, u64>,
    /// Examples of which tokens were cut off.
    pub truncated: u64,
    /// Tokens of all examples.
    pub tokens: u64,
    /// Tokens that the loss counts.
    pub trained_tokens: u64,
    /// The first few refusals with file and line.
    pub first_errors: Vec<String>,
    /// What the user may want to know, such as a missing end-of-sequence token.
    pub notes: Vec<String>,
}

/// End of the file: what the numbers before it are.
#[derive(Debug, Serialize, Deserialize)]
struct Footer {
    key: String,
    records_at: u64,
    count: u64,
    files: Vec<PathBuf>,
    report: Report,
}

#[derive(Debug)]
enum Storage {
    Memory(Vec<u8>),
    /// A file that others can cut off while it is mapped: its length is asked for before its bytes are touched.
    Map(Mmap, File),
}

/// Encoded examples with random access.
#[derive(Debug)]
pub struct TokenStore {
    storage: Storage,
    path: PathBuf,
    footer: Footer,
}

/// One example in a store.
#[derive(Debug, Clone, Copy)]
pub struct ExampleRef<'a> {
    ids: &'a [u8],
    labels: &'a [u8],
    /// Class of a classification row.
    pub class: Option<u32>,
    /// The file its row came from.
    pub file: &'a Path,
    /// The line of its row, from 1.
    pub line: u64,
    /// Tokens that the loss counts.
    pub trained_tokens: usize,
}

impl<'a> ExampleRef<'a> {
    /// Number of tokens t.
    pub fn len(&self) -> usize {
        self.ids.len() / 4
    }

    /// Whether it has no tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Token ids `[t]`.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = u32> + 'a {
        self.ids.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
    }

    /// Labels `[t]`, -100 where masked.
    pub fn labels(&self) -> impl ExactSizeIterator<Item = i32> + 'a {
        self.labels.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap_or([0; 4])))
    }

    /// The example as its own value.
    pub fn to_example(&self) -> Example {
        Example {
            input_ids: self.ids().collect(),
            labels: self.labels().collect(),
            class: self.class,
            truncated: false,
        }
    }
}

impl TokenStore {
    /// Opens a finished store; a damaged or unfinished file is an error.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(DataError::io(path))?;
        let length = file.metadata().map_err(DataError::io(path))?.len();
        if length < TAIL as u64 {
            return Err(store_fault(path, "too short; it is no token store or was cut off"));
        }
        Self::from_storage(map(file, path)?, path.to_path_buf())
    }

    fn from_storage(storage: Storage, path: PathBuf) -> Result<Self> {
        let bytes = storage.bytes();
        let fault = |message: &str| store_fault(&path, message);
        let body = bytes.len().checked_sub(TAIL).ok_or_else(|| fault("too short"))?;
        let (head, tail) = bytes.split_at(body);
        let (length, rest) = tail.split_at(8);
        let (checksum, mark) = rest.split_at(32);
        if mark != MARK {
            return Err(fault("the end mark is missing; the file was cut off or is no token store"));
        }
        if Sha256::digest(head).as_slice() != checksum {
            return Err(fault("the checksum differs; the file is damaged, delete it"));
        }
        let length = u64::from_le_bytes(length.try_into().unwrap_or_default()) as usize;
        let footer_at = body.checked_sub(length).ok_or_else(|| fault("the footer is damaged"))?;
        let footer: Footer = serde_json::from_slice(head.get(footer_at..).unwrap_or_default())
            .map_err(|error| fault(&format!("the footer is damaged: {error}")))?;
        let expected = footer.count.checked_mul(RECORD as u64).and_then(|n| n.checked_add(footer.records_at));
        if expected != Some(footer_at as u64) {
            return Err(fault("the number of examples does not fit the file"));
        }
        Ok(Self { storage, path, footer })
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.footer.count as usize
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.footer.count == 0
    }

    /// What became of the rows.
    pub fn report(&self) -> &Report {
        &self.footer.report
    }

    /// The key under which the store is cached: a hash of everything it was made from.
    pub fn key(&self) -> &str {
        &self.footer.key
    }

    /// The store's file, where it has a lasting one.
    pub fn path(&self) -> Option<&Path> {
        Some(self.path.as_path()).filter(|path| *path != Path::new(write::MEMORY))
    }

    fn record(&self, index: usize) -> Option<&[u8]> {
        if index >= self.len() {
            return None;
        }
        let at = self.footer.records_at as usize + index * RECORD;
        if !self.storage.is_whole() {
            return None;
        }
        self.storage.bytes().get(at..at + RECORD)
    }

    /// Tokens of example `index`; 0 where there is none, or the file was cut off.
    pub fn length(&self, index: usize) -> usize {
        self.record(index).map_or(0, |record| number(record, 8, 4) as usize)
    }

    /// Tokens of every example in order.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        (0..self.len()).map(|index| self.length(index))
    }

    /// Example `index`, in the order of the data. A file that was changed or cut off since it was opened is an error.
    pub fn get(&self, index: usize) -> Result<ExampleRef<'_>> {
        if !self.storage.is_whole() {
            return Err(store_fault(&self.path, "the file was cut off while it was in use; delete it and go on"));
        }
        let record = self.record(index).ok_or(DataError::Index { what: "example", index, len: self.len() })?;
        let offset = number(record, 0, 8) as usize;
        let bytes = 4 * number(record, 8, 4) as usize;
        let class = number(record, 12, 4) as u32;
        let file = self.footer.files.get(number(record, 24, 4) as usize).map_or(Path::new(""), PathBuf::as_path);
        let part = |from: usize| self.storage.bytes().get(from..from + bytes);
        let (Some(ids), Some(labels)) = (part(offset), part(offset + bytes)) else {
            return Err(store_fault(&self.path, "an example lies outside of the file"));
        };
        let (facts, sum) = record.split_at(FACTS);
        if checksum(ids, labels, facts) != sum {
            return Err(store_fault(
                &self.path,
                format!(
                    "the checksum of example {index} differs; the file was damaged while it was in use: delete it and go on"
                ),
            ));
        }
        Ok(ExampleRef {
            ids,
            labels,
            class: (class != u32::MAX).then_some(class),
            file,
            line: number(record, 16, 8),
            trained_tokens: number(record, 28, 4) as usize,
        })
    }

    /// A store of examples at hand.
    pub fn from_examples(examples: impl IntoIterator<Item = Example>) -> Result<Self> {
        let mut writer = write::Writer::new(None, String::new())?;
        let location = crate::error::Location { file: Path::new("memory").into(), line: 0 };
        for (at, example) in examples.into_iter().enumerate() {
            if example.input_ids.len() != example.labels.len() {
                return Err(DataError::Option {
                    key: "examples",
                    message: format!(
                        "example {at} has {} ids and {} labels",
                        example.input_ids.len(),
                        example.labels.len()
                    ),
                });
            }
            writer.add(&crate::error::Location { line: at as u64 + 1, ..location.clone() }, &example)?;
        }
        writer.report.rows = writer.report.used;
        writer.finish()
    }
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Storage::Memory(bytes) => bytes,
            Storage::Map(map, _) => map,
        }
    }

    /// Whether all bytes can be read: touching what a file no longer has ends the process.
    fn is_whole(&self) -> bool {
        match self {
            Storage::Memory(_) => true,
            Storage::Map(map, file) => file.metadata().is_ok_and(|m| m.len() >= map.len() as u64),
        }
    }
}

/// What a record says of its example's bytes.
fn checksum(ids: &[u8], labels: &[u8], facts: &[u8]) -> [u8; RECORD - FACTS] {
    let sum = Sha256::new().chain_update(ids).chain_update(labels).chain_update(facts).finalize();
    std::array::from_fn(|i| sum[i])
}

fn map(file: File, path: &Path) -> Result<Storage> {
    // SAFETY: store files are written once, under a temporary name, and never changed after they get their own. Another
    // process that breaks this is found out by the length, asked for before each access, and the checksum of each example;
    // only one that shortens the file within an access is not.
    let map = unsafe { Mmap::map(&file) }.map_err(DataError::io(path))?;
    Ok(Storage::Map(map, file))
}

fn store_fault(path: &Path, message: impl Into<String>) -> DataError {
    DataError::Store { path: path.to_path_buf(), message: message.into() }
}

fn number(record: &[u8], at: usize, bytes: usize) -> u64 {
    record.get(at..at + bytes).unwrap_or_default().iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

fn count_trained(labels: &[i32]) -> usize {
    labels.iter().skip(1).filter(|label| **label != IGNORE).count()
}
