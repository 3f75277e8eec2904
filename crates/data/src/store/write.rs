//! Writing a token store: to a temporary file in the cache folder that gets its name when whole, or to memory that moves to
//! an unnamed file when it grows.

use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, SpooledData, SpooledTempFile};

use super::{Footer, MARK, Report, Storage, TokenStore, count_trained, map};
use crate::encode::Example;
use crate::error::{DataError, Location, Result};
use crate::faults;

/// Bytes of examples, and of records, that are held in memory before a file takes them.
const IN_MEMORY: usize = 64 << 20;

/// Stands for the path of a store without a file.
pub(super) const MEMORY: &str = "memory";

enum Sink {
    Memory(SpooledTempFile),
    File(NamedTempFile),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Memory(file) => file.write(bytes),
            Sink::File(file) => file.write(bytes.get(..faults::allowed(bytes.len())?).unwrap_or_default()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Sink::Memory(file) => file.flush(),
            Sink::File(file) => file.flush(),
        }
    }
}

pub(super) struct Writer {
    path: PathBuf,
    sink: BufWriter<Sink>,
    records: BufWriter<SpooledTempFile>,
    hash: Sha256,
    offset: u64,
    files: Vec<Arc<Path>>,
    key: String,
    pub(super) report: Report,
}

impl Writer {
    /// A writer to `path`, or to memory.
    pub(super) fn new(path: Option<PathBuf>, key: String) -> Result<Self> {
        let sink = match &path {
            Some(path) => {
                let folder = path.parent().unwrap_or(Path::new("."));
                std::fs::create_dir_all(folder).map_err(DataError::io(folder))?;
                Sink::File(NamedTempFile::with_prefix_in(".tokens-", folder).map_err(DataError::io(folder))?)
            }
            None => Sink::Memory(SpooledTempFile::new(IN_MEMORY)),
        };
        Ok(Self {
            path: path.unwrap_or_else(|| PathBuf::from(MEMORY)),
            sink: BufWriter::with_capacity(1 << 18, sink),
            records: BufWriter::with_capacity(1 << 16, SpooledTempFile::new(IN_MEMORY / 4)),
            hash: Sha256::new(),
            offset: 0,
            files: Vec::new(),
            key,
            report: Report::default(),
        })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.offset += bytes.len() as u64;
        self.sink.write_all(bytes).map_err(DataError::io(&self.path))
    }

    /// Appends an example.
    pub(super) fn add(&mut self, location: &Location, example: &Example) -> Result<()> {
        let at = self.offset;
        let file = match self.files.iter().rposition(|file| *file == location.file) {
            Some(at) => at,
            None => {
                self.files.push(location.file.clone());
                self.files.len() - 1
            }
        };
        let ids: Vec<u8> = example.input_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let labels: Vec<u8> = example.labels.iter().flat_map(|label| label.to_le_bytes()).collect();
        self.put(&ids)?;
        self.put(&labels)?;
        let trained = count_trained(&example.labels);
        let mut record = Vec::with_capacity(super::RECORD);
        record.extend(at.to_le_bytes());
        record.extend((example.input_ids.len() as u32).to_le_bytes());
        record.extend(example.class.unwrap_or(u32::MAX).to_le_bytes());
        record.extend(location.line.to_le_bytes());
        record.extend((file as u32).to_le_bytes());
        record.extend((trained as u32).to_le_bytes());
        record.extend(super::checksum(&ids, &labels, &record));
        self.records.write_all(&record).map_err(DataError::io(&self.path))?;
        self.report.used += 1;
        self.report.truncated += u64::from(example.truncated);
        self.report.tokens += example.input_ids.len() as u64;
        self.report.trained_tokens += trained as u64;
        Ok(())
    }

    /// Completes the store and opens it.
    pub(super) fn finish(mut self) -> Result<TokenStore> {
        let path = self.path.clone();
        let records_at = self.offset;
        let mut records = self.unbuffer_records()?;
        records.seek(SeekFrom::Start(0)).map_err(DataError::io(&path))?;
        let mut block = vec![0u8; 1 << 16];
        loop {
            let n = records.read(&mut block).map_err(DataError::io(&path))?;
            if n == 0 {
                break;
            }
            self.put(block.get(..n).unwrap_or_default())?;
        }
        let footer = Footer {
            key: self.key.clone(),
            records_at,
            count: self.report.used,
            files: self.files.iter().map(|file| file.to_path_buf()).collect(),
            report: self.report.clone(),
        };
        let footer = serde_json::to_vec(&footer)
            .map_err(|error| DataError::Store { path: path.clone(), message: error.to_string() })?;
        self.put(&footer)?;
        let checksum = std::mem::take(&mut self.hash).finalize();
        for part in [&(footer.len() as u64).to_le_bytes()[..], checksum.as_slice(), MARK] {
            self.sink.write_all(part).map_err(DataError::io(&path))?;
        }
        let sink = self.sink.into_inner().map_err(|error| DataError::io(&path)(error.into_error()))?;
        let storage = match sink {
            Sink::Memory(spooled) => match spooled.into_inner() {
                SpooledData::InMemory(bytes) => Storage::Memory(bytes.into_inner()),
                SpooledData::OnDisk(file) => map(file, &path)?,
            },
            Sink::File(file) => {
                file.as_file().sync_all().map_err(DataError::io(&path))?;
                faults::instant().map_err(DataError::io(&path))?;
                let file = file.persist(&path).map_err(|error| DataError::io(&path)(error.error))?;
                if let Some(folder) = path.parent().and_then(|folder| std::fs::File::open(folder).ok()) {
                    folder.sync_all().map_err(DataError::io(&path))?;
                }
                map(file, &path)?
            }
        };
        TokenStore::from_storage(storage, path)
    }

    fn unbuffer_records(&mut self) -> Result<SpooledTempFile> {
        let empty = BufWriter::new(SpooledTempFile::new(0));
        std::mem::replace(&mut self.records, empty)
            .into_inner()
            .map_err(|error| DataError::io(&self.path)(error.into_error()))
    }
}
