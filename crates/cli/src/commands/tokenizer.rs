//! `espalier tokenizer`.

use std::fmt;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use espalier_data::{DataOptions, Source, TokenizerOptions, train_tokenizer};
use serde::Serialize;

use crate::output::Output;

/// Trains a byte-level BPE tokenizer on the text of data files and writes it as a tokenizer folder.
#[derive(Debug, Args)]
pub(crate) struct TokenizerTrain {
    /// Data file or folder; may be given several times.
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// Tokens, special ones included.
    #[arg(long, default_value_t = 2048)]
    vocab_size: usize,
    /// Rows read; 0: all.
    #[arg(long, default_value_t = 0)]
    limit_rows: usize,
    /// Chat template (Jinja); ChatML if absent.
    #[arg(long)]
    chat_template: Option<PathBuf>,
    /// Folder to write.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Serialize)]
struct Written {
    path: PathBuf,
    tokens: usize,
    rows: u64,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} tokens from {} rows", self.path.display(), self.tokens, self.rows)
    }
}

impl TokenizerTrain {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let template = self.chat_template.as_ref().map(std::fs::read_to_string).transpose()?;
        let limit = (self.limit_rows > 0).then_some(self.limit_rows);
        let source = Source::open_many(&self.data, DataOptions { limit, ..DataOptions::default() })?;
        let options = TokenizerOptions { vocab_size: self.vocab_size, chat_template: template };
        let (tokens, rows) = train_tokenizer(&source, &options, &self.out)?;
        out.result(&Written { path: self.out, tokens, rows })
    }
}
