//! What can go wrong in training, each naming the file, key or step, with a hint where one helps.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// An adapter or its files.
    #[error(transparent)]
    Adapter(#[from] espalier_adapters::Error),
    /// The base model.
    #[error(transparent)]
    Model(Box<espalier_models::Error>),
    /// The data.
    #[error(transparent)]
    Data(Box<espalier_data::DataError>),
    /// Generation or evaluation.
    #[error(transparent)]
    Infer(Box<espalier_infer::Error>),
    /// A file of the run folder.
    #[error(transparent)]
    RunFile(#[from] crate::run::RunError),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A recipe is not valid.
    #[error("{place}: {message}")]
    Recipe {
        /// File and line, or the key.
        place: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A run folder or checkpoint is not valid.
    #[error("{}: {message}", path.display())]
    Run {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A run cannot continue because what it was made of has changed.
    #[error("{}: cannot resume, because what the run was made of has changed:\n{}", path.display(), changes.join("\n"))]
    Changed {
        /// The run folder.
        path: PathBuf,
        /// One line for each difference.
        changes: Vec<String>,
    },
    /// There is not enough memory for the run.
    #[error(
        "the run needs about {} MiB of memory, of which it holds {}; {} MiB more can be had, {} too little",
        total >> 20, held >> 20, available >> 20, (total - held - available).div_ceil(1 << 20)
    )]
    Memory {
        /// Estimated peak in bytes.
        total: u64,
        /// What of it is in use.
        held: u64,
        /// What can still be had.
        available: u64,
        /// What of the peak grows with the batch.
        activations: u64,
    },
    /// Trainable tensors are not trained.
    #[error("{} trainable tensors are not trained after {steps} steps:\n{}", tensors.len(), tensors.join("\n"))]
    NotTrained {
        /// Steps of this start.
        steps: usize,
        /// One line for each tensor, with what is wrong.
        tensors: Vec<String>,
    },
    /// The loss or a gradient is not a number.
    #[error("step {step}: {what} is {value}; stopped before the update, last good checkpoint: {checkpoint}")]
    NotFinite {
        /// Step, from 1.
        step: usize,
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The checkpoint, or "none".
        checkpoint: String,
    },
}

/// Errors of other crates are boxed: they are large, and rare.
macro_rules! boxed {
    ($($variant:ident($error:ty),)*) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        })*
    };
}

boxed! {
    Model(espalier_models::Error),
    Data(espalier_data::DataError),
    Infer(espalier_infer::Error),
}

impl Error {
    /// A file could not be read or written.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// A recipe key has a wrong value.
    pub fn recipe(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Recipe { place: place.into(), message: message.into() }
    }

    /// A run folder is not valid.
    pub fn run(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Run { path: path.into(), message: message.into() }
    }

    /// What the user can do about it, if there is something beyond the message.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Adapter(e) => e.hint(),
            Self::Model(e) => e.hint(),
            Self::RunFile(crate::run::RunError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                Some("free some space; earlier files are untouched, and --resume goes on from the last checkpoint".into())
            }
            Self::NotFinite { .. } => Some(
                "lower the learning rate, set max_grad_norm, or train in f32, in a run folder of its own: the checkpoint goes on only \
                 with the recipe it was made with, to the same step"
                    .into(),
            ),
            Self::Memory { activations, .. } => Some(format!(
                "{} MiB of it grow with the batch: set a smaller batch_size (with more accumulation), a smaller max_length, or \
                 checkpointing; less weight is held with quantization; --allow-memory goes on nevertheless",
                activations >> 20
            )),
            Self::NotTrained { .. } => Some(
                "leave them out of the adapter (target_modules, modules_to_save, bias), or give rows that use them".into(),
            ),
            Self::Changed { .. } => Some("start a new run folder, or put the old values back".into()),
            _ => None,
        }
    }
}
