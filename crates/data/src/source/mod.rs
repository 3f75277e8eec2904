//! Where rows come from: files of several kinds, read one record after the other, never loaded whole.
//!
//! A folder stands for all data files directly in it, in the order of their names.

mod csv;
mod json;
mod jsonl;
mod line;
mod pages;
mod parquet;
mod text;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{DataError, Location, Result};
use crate::row::{Label, Row};

/// What one row of a text file is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextUnit {
    /// Each line that is not blank.
    #[default]
    Line,
    /// Lines up to the next blank one (or up to `text_separator`), joined.
    Paragraph,
    /// The whole file.
    File,
}

/// How records become rows. The columns are found by their usual names unless named here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataOptions {
    /// Column with the conversation.
    pub messages_column: Option<String>,
    /// Column with tool descriptions beside a conversation.
    pub tools_column: Option<String>,
    /// Column with the given part.
    pub prompt_column: Option<String>,
    /// Column with the trained part.
    pub completion_column: Option<String>,
    /// Column with text.
    pub text_column: Option<String>,
    /// Column with the second text of a pair.
    pub text_pair_column: Option<String>,
    /// Column with the class.
    pub label_column: Option<String>,
    /// Column with the better reply.
    pub chosen_column: Option<String>,
    /// Column with the worse reply.
    pub rejected_column: Option<String>,
    /// Column with token ids.
    pub input_ids_column: Option<String>,
    /// Column with the labels of token ids.
    pub labels_column: Option<String>,
    /// What one row of a text file is.
    pub text_unit: TextUnit,
    /// A line that ends a text row, instead of a blank line (with `text_unit = "paragraph"`), for example `<|endoftext|>`.
    pub text_separator: Option<String>,
    /// Count and pass over bad rows instead of stopping at the first.
    pub skip_bad_rows: bool,
    /// Read no more than this many good rows.
    pub limit: Option<usize>,
}

/// Kind of a data file, by its ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// One JSON object a line.
    JsonLines,
    /// A JSON list of objects, or objects one after the other.
    Json,
    /// Comma-separated table with a header.
    Csv,
    /// Tab-separated table with a header.
    Tsv,
    /// Apache Parquet.
    Parquet,
    /// Plain text.
    Text,
}

impl Format {
    /// The kind that a file name's ending stands for.
    pub fn of(path: &Path) -> Option<Format> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" => Some(Format::JsonLines),
            "json" => Some(Format::Json),
            "csv" => Some(Format::Csv),
            "tsv" => Some(Format::Tsv),
            "parquet" => Some(Format::Parquet),
            "txt" => Some(Format::Text),
            _ => None,
        }
    }
}

/// Files to read rows from.
#[derive(Debug, Clone)]
pub struct Source {
    files: Vec<(Arc<Path>, Format)>,
    options: DataOptions,
}

impl Source {
    /// A file, or all data files of a folder.
    pub fn open(path: impl AsRef<Path>, options: DataOptions) -> Result<Self> {
        Self::open_many(&[path.as_ref().to_path_buf()], options)
    }

    /// Several files or folders, one after the other.
    pub fn open_many(paths: &[PathBuf], options: DataOptions) -> Result<Self> {
        let mut files = Vec::new();
        for path in paths {
            let meta = std::fs::metadata(path).map_err(DataError::io(path))?;
            if meta.is_dir() {
                files.extend(folder(path)?);
            } else {
                let format = Format::of(path).ok_or_else(|| DataError::Format {
                    path: path.clone(),
                    found: "the name tells no kind of data file".into(),
                })?;
                files.push((Arc::from(path.as_path()), format));
            }
        }
        if files.is_empty() {
            return Err(DataError::Option { key: "data", message: "no file given".into() });
        }
        Ok(Self { files, options })
    }

    /// The files in reading order.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Arc<Path>> {
        self.files.iter().map(|(path, _)| path)
    }

    /// How records become rows.
    pub fn options(&self) -> &DataOptions {
        &self.options
    }

    /// Every record as it stands in the files. A row's fault leaves the iterator usable; any other error ends it.
    pub fn records(&self) -> Records {
        Records { files: self.files.clone().into_iter(), current: None, options: self.options.clone() }
    }

    /// Every row, up to the limit. A row's fault leaves the iterator usable; any other error ends it.
    pub fn rows(&self) -> Rows {
        Rows { records: self.records(), left: self.options.limit.unwrap_or(usize::MAX) }
    }

    /// SHA-256 over the bytes of all files and their order.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0u8; 1 << 20];
        for (path, format) in &self.files {
            let mut file = File::open(path).map_err(DataError::io(path))?;
            let mut length = 0u64;
            loop {
                let n = file.read(&mut buffer).map_err(DataError::io(path))?;
                if n == 0 {
                    break;
                }
                length += n as u64;
                hash.update(buffer.get(..n).unwrap_or_default());
            }
            hash.update(length.to_le_bytes());
            hash.update([*format as u8]);
        }
        Ok(hash.finalize().into())
    }

    /// The class names of the data in order of their bytes, or none where classes are numbers. Reads everything once.
    pub fn label_names(&self) -> Result<Option<Vec<String>>> {
        let mut names = std::collections::BTreeSet::new();
        for row in self.rows() {
            match row {
                Ok((_, Row::Classification { label: Label::Name(name), .. })) => {
                    names.insert(name);
                }
                Ok(_) => {}
                Err(DataError::Row { .. }) if self.options.skip_bad_rows => {}
                Err(error) => return Err(error),
            }
        }
        let numbers = names.iter().all(|name| name.parse::<usize>().is_ok());
        Ok(if numbers { None } else { Some(names.into_iter().collect()) })
    }
}

fn folder(path: &Path) -> Result<Vec<(Arc<Path>, Format)>> {
    let mut files = Vec::new();
    let mut others = Vec::new();
    for entry in std::fs::read_dir(path).map_err(DataError::io(path))? {
        let entry = entry.map_err(DataError::io(path))?.path();
        let name = entry.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        match Format::of(&entry) {
            Some(format) if entry.is_file() && !name.starts_with('.') => {
                files.push((Arc::from(entry.as_path()), format))
            }
            _ => others.push(name),
        }
    }
    if files.is_empty() {
        others.sort();
        let found = if others.is_empty() {
            "an empty folder".to_string()
        } else {
            format!("a folder with only {}", others.join(", "))
        };
        return Err(DataError::Format { path: path.to_path_buf(), found });
    }
    files.sort();
    Ok(files)
}

type Stream = Box<dyn Iterator<Item = Result<(Location, Value)>>>;

/// Iterator over records; see [`Source::records`].
pub struct Records {
    files: std::vec::IntoIter<(Arc<Path>, Format)>,
    current: Option<Stream>,
    options: DataOptions,
}

impl Iterator for Records {
    type Item = Result<(Location, Value)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.current.as_mut().map(Iterator::next) {
                Some(Some(Err(error))) if !matches!(error, DataError::Row { .. }) => return self.end(error),
                Some(Some(item)) => return Some(item),
                Some(None) | None => {}
            }
            let (path, format) = self.files.next()?;
            let opened: Result<Stream> = match format {
                Format::JsonLines => jsonl::open(path).map(|it| Box::new(it) as Stream),
                Format::Json => json::open(path).map(|it| Box::new(it) as Stream),
                Format::Csv => csv::open(path, b',').map(|it| Box::new(it) as Stream),
                Format::Tsv => csv::open(path, b'\t').map(|it| Box::new(it) as Stream),
                Format::Parquet => parquet::open(path).map(|it| Box::new(it) as Stream),
                Format::Text => text::open(path, self.options.text_unit, self.options.text_separator.clone())
                    .map(|it| Box::new(it) as Stream),
            };
            match opened {
                Ok(stream) => self.current = Some(stream),
                Err(error) => return self.end(error),
            }
        }
    }
}

impl Records {
    fn end(&mut self, error: DataError) -> Option<Result<(Location, Value)>> {
        self.current = None;
        self.files = Vec::new().into_iter();
        Some(Err(error))
    }
}

/// Iterator over rows; see [`Source::rows`].
pub struct Rows {
    records: Records,
    left: usize,
}

impl Iterator for Rows {
    type Item = Result<(Location, Row)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let item = self.records.next()?;
        Some(item.and_then(|(location, value)| match Row::from_value(value, &self.records.options) {
            Ok(row) => {
                self.left -= 1;
                Ok((location, row))
            }
            Err(problem) => Err(DataError::Row { location, problem }),
        }))
    }
}
