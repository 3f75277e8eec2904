//! What can go wrong in generation and evaluation, each naming the option, prompt, row or token.

use std::collections::BTreeMap;

use espalier_data::{DataError, RowError};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of generation and evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The model refused its input.
    #[error(transparent)]
    Model(#[from] espalier_models::Error),
    /// Data could not be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A text could not be encoded or decoded.
    #[error(transparent)]
    Text(#[from] RowError),
    /// An option has a value that cannot be meant.
    #[error("{key} = {value}: {message}")]
    Option {
        /// The option.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is accepted.
        message: String,
    },
    /// A prompt cannot be continued.
    #[error("prompt {index}: {message}")]
    Prompt {
        /// Prompt, from 0.
        index: usize,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A row or example cannot be used with this model.
    #[error("example {index}: {message}")]
    Example {
        /// Example, from 0.
        index: usize,
        /// What is wrong and what would be right.
        message: String,
    },
    /// The model's scores are no scores, or do not fit the tokens.
    #[error("the model's scores cannot be used: {0}")]
    Scores(String),
    /// The model is of the wrong kind.
    #[error("`{family}` cannot be used for {task}: {message}")]
    Kind {
        /// `model_type` of the model.
        family: String,
        /// What was asked.
        task: &'static str,
        /// What would be right.
        message: &'static str,
    },
    /// Nothing is left to evaluate.
    #[error("nothing to evaluate: of {rows} rows all were refused ({})", counts(refused))]
    Empty {
        /// Rows given.
        rows: usize,
        /// Refused rows by reason.
        refused: BTreeMap<String, usize>,
    },
}

impl Error {
    /// An option has a value that cannot be meant.
    pub(crate) fn option(key: &'static str, value: impl ToString, message: impl Into<String>) -> Self {
        Self::Option { key, value: value.to_string(), message: message.into() }
    }

    /// What the user can do about it, if there is something beyond the message.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(e) => e.hint(),
            Self::Scores(_) => {
                Some("look at the adapter and the training run: weights that are not finite give this".into())
            }
            _ => None,
        }
    }
}

fn counts(refused: &BTreeMap<String, usize>) -> String {
    if refused.is_empty() {
        return "there were none".into();
    }
    refused.iter().map(|(reason, n)| format!("{reason}: {n}")).collect::<Vec<_>>().join(", ")
}
