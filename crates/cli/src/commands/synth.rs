//! `espalier synth`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use espalier_data::synthetic::{self, Skill, Source, Split};
use serde::Serialize;

use crate::output::Output;

/// Writes generated text as JSONL: stories, arithmetic, lists, questions, instructions, or one skill alone.
#[derive(Debug, Args)]
pub(crate) struct Synth {
    /// File to write.
    #[arg(long)]
    out: PathBuf,
    /// Rows.
    #[arg(long, default_value_t = 1000)]
    samples: u64,
    /// One skill, instead of the mixture for pre-training.
    #[arg(long)]
    skill: Option<String>,
    /// Seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Rows of the test part, which shares no input with the training part.
    #[arg(long)]
    test: bool,
}

#[derive(Debug, Serialize)]
struct Written {
    path: PathBuf,
    rows: u64,
    characters: u64,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} rows, {} characters", self.path.display(), self.rows, self.characters)
    }
}

impl Synth {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let source = match &self.skill {
            Some(name) => Source::from(name.parse::<Skill>()?),
            None => Source::from(synthetic::mixture()),
        };
        let split = if self.test { Split::Test } else { Split::Train };
        let counts = synthetic::write_corpus(&self.out, self.samples, self.seed, split, source)
            .with_context(|| self.out.display().to_string())?;
        out.result(&Written { path: self.out, rows: counts.total.samples, characters: counts.total.chars })
    }
}
