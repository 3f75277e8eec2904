//! Errors of the data crate: what is wrong, in which file and row, and what to do about it.
//!
//! [`RowError`] is a fault of one row, which `skip_bad_rows` counts and passes over; [`DataError`] stops the work.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::encode::Truncation;

/// Result of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// Where a row begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub file: Arc<Path>,
    /// The line, counted from 1 (in Parquet, which has no lines, the row).
    pub line: u64,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// What stops the reading, encoding or dealing of data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The system refused to read or write.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is of no kind that can be read, or the folder holds none.
    #[error("{path}: {found}; data files end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .txt")]
    Format {
        /// The file or folder.
        path: PathBuf,
        /// What was there instead.
        found: String,
    },
    /// The file as a whole is damaged: nothing behind this line can be read.
    #[error("{path}:{line}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// The line at which reading stopped, from 1.
        line: u64,
        /// What is wrong.
        message: String,
    },
    /// One row is unusable.
    #[error("{location}: {problem}")]
    Row {
        /// Where the row begins.
        location: Location,
        /// What is wrong with it.
        problem: RowError,
    },
    /// No tokenizer could be made of a folder.
    #[error("{path}: {message}")]
    Tokenizer {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The chat template does not parse, or failed outside any row.
    #[error("chat template: {0}")]
    Template(String),
    /// A conversation would teach the model to go on where its turn ends.
    #[error(
        "{location}: the trained turn ends in {token:?}, which is no stop token of the model ({stops}), so the model would not \
         learn to stop; let the template's generation block include the end-of-turn mark, list the mark's id under \
         eos_token_id in generation_config.json, choose another chat_template, or accept it with allow_no_stop"
    )]
    NoStop {
        /// Where the conversation begins.
        location: Location,
        /// The last trained token of the turn.
        token: String,
        /// The stop tokens that are known.
        stops: String,
    },
    /// An option has a value that cannot be meant.
    #[error("{key}: {message}")]
    Option {
        /// The option.
        key: &'static str,
        /// What is wrong, and what is accepted.
        message: String,
    },
    /// Not one row is left to train on.
    #[error("no usable row in {source_name}: {rows} read, refused: {refused}")]
    Empty {
        /// The files, as one text.
        source_name: String,
        /// Rows read.
        rows: u64,
        /// Counts by reason, as one text.
        refused: String,
    },
    /// A token store is not what it should be.
    #[error("token store {path}: {message}")]
    Store {
        /// The file, or `memory`.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// An index lies outside.
    #[error("{what} {index} does not exist: there are {len}")]
    Index {
        /// What was asked for.
        what: &'static str,
        /// Its index, from 0.
        index: usize,
        /// How many there are.
        len: usize,
    },
    /// An example does not fit the row it should go into.
    #[error(
        "example {index} has {length} tokens, more than max_length {max_length}; encode with this max_length first"
    )]
    TooLong {
        /// Index in the store.
        index: usize,
        /// Its tokens.
        length: usize,
        /// The room of one row.
        max_length: usize,
    },
}

impl DataError {
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> DataError {
        move |source| DataError::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A template's fault, with the file that the template is from.
    pub(crate) fn in_file(self, path: &Path) -> DataError {
        match self {
            DataError::Template(fault) => DataError::Template(format!("{}: {fault}", path.display())),
            other => other,
        }
    }

    pub(crate) fn file(path: &Path, line: u64, message: impl Into<String>) -> DataError {
        DataError::File { path: path.to_path_buf(), line, message: message.into() }
    }
}

/// What is wrong with one row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// The bytes are not UTF-8.
    #[error("not UTF-8: the first bad byte is number {at} of the row; convert the file to UTF-8")]
    Utf8 {
        /// Offset of the first bad byte in the row, from 1.
        at: usize,
    },
    /// The text is not JSON.
    #[error("invalid JSON: {0}")]
    Json(String),
    /// A table row has more or fewer cells than the header.
    #[error("{found} cells where the header has {expected}; quote cells that contain the delimiter")]
    Cells {
        /// Cells of the header.
        expected: usize,
        /// Cells of this row.
        found: usize,
    },
    /// The row is not an object of named columns.
    #[error("a row must be an object with named keys, this is {0}")]
    NotAnObject(&'static str),
    /// The keys fit no known kind of row.
    #[error(
        "no known kind of row has the keys [{found}]; accepted: messages | conversations, prompt + completion, \
         instruction (+ input) + output, question + answer, inputs + targets, chosen + rejected (+ prompt), \
         input_ids (+ labels), text + label, sentence1 + sentence2 + label, premise + hypothesis + label, text; \
         or name the columns, for example text_column"
    )]
    Shape {
        /// The keys found, in their order.
        found: String,
    },
    /// A needed key is absent or null.
    #[error("key {key:?} is absent or null; the row has [{found}]")]
    Missing {
        /// The key.
        key: String,
        /// The keys found.
        found: String,
    },
    /// A value is of the wrong kind.
    #[error("{key}: expected {expected}, found {found}")]
    Type {
        /// Key, with the position for list elements.
        key: String,
        /// What was expected.
        expected: &'static str,
        /// What was found.
        found: String,
    },
    /// The row asks for something that would be lost.
    #[error("{0}")]
    Unsupported(String),
    /// The chat template refused the conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// The trained part of a conversation cannot be found.
    #[error(
        "the chat template has no generation marks, and rendering the conversation up to message {turn} gives no prefix \
         of the whole ({detail}); mark assistant text with {{% generation %}} or set completion_only = false"
    )]
    Spans {
        /// Message, from 0.
        turn: usize,
        /// Which rendering differs, and where.
        detail: String,
    },
    /// A conversation came without a chat template.
    #[error(
        "a conversation needs a chat template, and the model folder has none; name a shipped one or a file by \
         `chat_template`, put chat_template.jinja into the folder, or name a folder with tokenizer and template by \
         `tokenizer`"
    )]
    NoTemplate,
    /// Text came without a tokenizer.
    #[error("text needs a tokenizer, and the model folder has none; only rows with input_ids can be used")]
    NoTokenizer,
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// There is nothing to learn from this row.
    #[error("no trained token: every label is masked")]
    NoTrainedToken,
    /// Truncation cut off all that was to be learned.
    #[error("no trained token is left of {length} tokens after truncation to {max_length}; raise max_length")]
    NoTrainedTokenLeft {
        /// Tokens before truncation.
        length: usize,
        /// The limit.
        max_length: usize,
    },
    /// The row is longer than the limit and is not to be cut.
    #[error(
        "{length} tokens, more than max_length {max_length}, and truncation = \"{truncation}\"; raise max_length, or cut with \
         right or left"
    )]
    TooLong {
        /// Tokens.
        length: usize,
        /// The limit.
        max_length: usize,
        /// What was to happen.
        truncation: Truncation,
    },
    /// A token id is not in the vocabulary.
    #[error("{key}[{at}] = {id} is outside the vocabulary of {vocab} tokens")]
    TokenId {
        /// `input_ids` or `labels`.
        key: &'static str,
        /// Position in the list, from 0.
        at: usize,
        /// The id.
        id: i64,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Two lists that belong together differ in length.
    #[error("{key} has {found} entries where input_ids has {expected}")]
    Length {
        /// The list.
        key: &'static str,
        /// Its length.
        found: usize,
        /// The length of input_ids.
        expected: usize,
    },
    /// A class label is not among the known ones.
    #[error("label {found} is not one of [{known}]; set label_names")]
    Label {
        /// The label.
        found: String,
        /// The known labels.
        known: String,
    },
}

impl RowError {
    /// The short name under which rows of this fault are counted.
    pub fn reason(&self) -> &'static str {
        match self {
            RowError::Utf8 { .. } => "not_utf8",
            RowError::Json(_) => "invalid_json",
            RowError::Cells { .. } => "wrong_cell_count",
            RowError::NotAnObject(_) => "not_an_object",
            RowError::Shape { .. } => "unknown_keys",
            RowError::Missing { .. } => "missing_key",
            RowError::Type { .. } => "wrong_type",
            RowError::Unsupported(_) => "unsupported",
            RowError::Template(_) => "chat_template",
            RowError::Spans { .. } => "no_trained_span",
            RowError::NoTemplate => "no_chat_template",
            RowError::NoTokenizer => "no_tokenizer",
            RowError::Tokenizer(_) => "tokenizer",
            RowError::NoTrainedToken => "no_trained_token",
            RowError::NoTrainedTokenLeft { .. } => "no_trained_token_after_truncation",
            RowError::TooLong { .. } => "too_long",
            RowError::TokenId { .. } => "token_id_out_of_range",
            RowError::Length { .. } => "length_mismatch",
            RowError::Label { .. } => "unknown_label",
        }
    }

    /// Whether the row is sound but of no use: such rows are counted and passed over even where bad rows are errors.
    pub fn is_refusal(&self) -> bool {
        match self {
            RowError::TooLong { truncation, .. } => *truncation == Truncation::Drop,
            _ => matches!(self, RowError::NoTrainedToken | RowError::NoTrainedTokenLeft { .. }),
        }
    }

    pub(crate) fn kind(key: impl Into<String>, expected: &'static str, found: &serde_json::Value) -> RowError {
        RowError::Type { key: key.into(), expected, found: describe(found) }
    }
}

/// A JSON value in a few words, for messages.
pub(crate) fn describe(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => {
            let short: String = s.chars().take(40).collect();
            if short.len() < s.len() { format!("the string {short:?}...") } else { format!("the string {short:?}") }
        }
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => format!("an object with {} keys", map.len()),
    }
}
