//! Errors of the run-folder writers and readers: each names the file, the place in it and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Why a file of a run folder could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The operating system refused: full disk, missing folder, no permission.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, as a verb phrase.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A file could not be replaced as a whole; the earlier one is unharmed.
    #[error(transparent)]
    Replace(#[from] espalier_adapters::Error),
    /// A new run would write over the metrics of an earlier one.
    #[error("{} already holds the metrics of a run: resume it, or choose another output folder", path.display())]
    Exists {
        /// The existing file.
        path: PathBuf,
    },
    /// A complete line of `metrics.jsonl` is not a record.
    #[error("{}:{line}: {reason}; remove or repair this line", path.display())]
    Line {
        /// The metrics file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A record cannot be written as asked.
    #[error("record of step {step} for {}: {reason}", path.display())]
    Record {
        /// The metrics file.
        path: PathBuf,
        /// The record's optimiser step.
        step: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A TensorBoard event file is damaged.
    #[error("{}: record {record} at byte {offset}: {reason}", path.display())]
    Event {
        /// The event file.
        path: PathBuf,
        /// Record number, from 0.
        record: usize,
        /// Byte offset of the record.
        offset: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl RunError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }
}
