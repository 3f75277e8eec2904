//! What can go wrong with an adapter, each naming the file, key, tensor and both shapes, with a hint where one helps.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of adapters and their files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the byte or key where known.
        message: String,
    },
    /// A setting is unknown, missing or contradicts another.
    #[error("{key}: {message}")]
    Config {
        /// The setting.
        key: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A target pattern matches no module.
    #[error("{key}: `{pattern}` matches no module{}", near(near_misses))]
    NoTarget {
        /// The setting that holds the pattern.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// Modules with similar names.
        near_misses: Vec<String>,
    },
    /// A tensor has another shape than its place.
    #[error("{tensor}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape of its place.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// Tensors of the file and places of the model do not pair up.
    #[error("{}: not a one-to-one match with the model: {}", path.display(), lists(missing, unused))]
    Unpaired {
        /// The adapter's weights file.
        path: PathBuf,
        /// Places without a tensor.
        missing: Vec<String>,
        /// Tensors without a place.
        unused: Vec<String>,
    },
    /// The adapter was made for another base.
    #[error(
        "{}: made for a base with hash {expected}, but this base has {found}",
        path.display()
    )]
    WrongBase {
        /// The adapter folder.
        path: PathBuf,
        /// Hash recorded in the adapter.
        expected: String,
        /// Hash of the base in use.
        found: String,
    },
    /// The adapter was made for a base with the same weights, but other settings.
    #[error("{}: made for a base with other settings: {}", path.display(), differing.join("; "))]
    OtherSettings {
        /// The adapter's files.
        path: PathBuf,
        /// The settings that differ, each with both values.
        differing: Vec<String>,
    },
    /// The operation does not exist for this method or module.
    #[error("{what}: {reason}")]
    Unsupported {
        /// What was asked.
        what: String,
        /// Why not, and what to do instead.
        reason: String,
    },
    /// No adapter of that name is loaded.
    #[error("no adapter named `{name}` is loaded (loaded: {})", list(loaded))]
    NoAdapter {
        /// The name asked for.
        name: String,
        /// Names that exist.
        loaded: Vec<String>,
    },
}

impl Error {
    /// A setting is wrong.
    pub fn config(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { key: key.into(), message: message.into() }
    }

    /// A file is malformed.
    pub fn format(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Format { path: path.into(), message: message.into() }
    }

    /// A file could not be read or written.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// Something that is not done, and why.
    pub fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), reason: reason.into() }
    }

    /// What the user can do about it, if there is something beyond the message.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::WrongBase { .. } | Self::OtherSettings { .. } => Some(
                "load the base it was trained on, or pass --allow-base to use it all the same (results will differ)"
                    .into(),
            ),
            Self::NoTarget { .. } => Some("list the modules of a model with `espalier inspect MODEL --modules`".into()),
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Some("free some space; earlier files are untouched".into())
            }
            _ => None,
        }
    }
}

fn near(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; near misses: {}", list(names)) }
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    if names.is_empty() {
        return "none".into();
    }
    let mut text = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

fn lists(missing: &[String], unused: &[String]) -> String {
    format!(
        "{} declared but not in the file ({}); {} in the file but without a place ({})",
        missing.len(),
        list(missing),
        unused.len(),
        list(unused)
    )
}
