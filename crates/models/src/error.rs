//! What can go wrong with a base model, each naming the file, key or tensor.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of base models.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A module or file of the adapter layer failed.
    #[error(transparent)]
    Adapter(#[from] espalier_adapters::Error),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `config.json` says something that is not supported or does not fit.
    #[error("{}: {key}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// The folder holds no model that can be read.
    #[error("{}: {message}", path.display())]
    NotAModel {
        /// The folder or file.
        path: PathBuf,
        /// What was looked for and what was found.
        message: String,
    },
    /// The model's tensors and the architecture's do not match.
    #[error("{}: the weights do not match the architecture `{family}`: {missing} missing, {unused} not used", path.display())]
    Weights {
        /// The folder.
        path: PathBuf,
        /// The architecture.
        family: String,
        /// Tensors asked for but not there.
        missing: String,
        /// Tensors there but not asked for.
        unused: String,
    },
    /// A tensor has the wrong shape.
    #[error("{}: {tensor}: expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The architecture's shape.
        expected: Vec<usize>,
        /// The file's shape.
        found: Vec<usize>,
    },
    /// A folder to be written holds something that must not be lost.
    #[error("{}: {message}", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What it holds.
        message: String,
    },
    /// An input does not fit the model.
    #[error("{0}")]
    Input(String),
}

impl Error {
    /// A file could not be read or written.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// What the user can do about it, if there is something beyond the message.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Adapter(e) => e.hint(),
            Self::Occupied { .. } => Some("name a new folder, or clear this one by hand".into()),
            Self::NotAModel { .. } => {
                Some("give a Hugging Face model folder (config.json and *.safetensors) or a .gguf file".into())
            }
            _ => None,
        }
    }
}
