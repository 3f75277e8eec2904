//! `espalier quickstart`.

use std::fmt;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use espalier_train::quickstart::{self, Quickstart as Found, Size};
use serde::Serialize;

use crate::output::Output;
use crate::progress::TrainBar;

/// Shows the whole thing on the embedded model: measures, trains an adapter on a skill it lacks, measures again, saves,
/// merges and compares.
#[derive(Debug, Args)]
pub(crate) struct Quickstart {
    /// Folder for everything that is written.
    #[arg(long, default_value = "runs/quickstart")]
    out: PathBuf,
    /// Steps of training.
    #[arg(long, default_value_t = Size::default().steps)]
    steps: usize,
    /// Unseen inputs.
    #[arg(long, default_value_t = Size::default().test_rows)]
    test_rows: usize,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Report(Found);

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.0;
        let percent = |x: f64| 100.0 * x;
        writeln!(f, "Skill `{}`, {} unseen inputs, {} steps:", r.skill, r.test_rows, r.steps)?;
        writeln!(f, "  before   {:5.1} % right", percent(r.accuracy_before))?;
        writeln!(f, "  after    {:5.1} % right", percent(r.accuracy_after))?;
        writeln!(
            f,
            "  merged   {:5.1} % right (largest difference of scores {:.1e})",
            percent(r.accuracy_merged),
            r.merged_difference
        )?;
        writeln!(f, "  adapter  {} (loads in PEFT)", r.adapter.display())?;
        writeln!(f, "  merged   {}", r.merged.display())?;
        writeln!(f, "  report   {}", r.report.display())?;
        write!(f, "  {:.1} s", r.seconds)
    }
}

impl Quickstart {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let stop = super::train::stop_flag()?;
        let size = Size { steps: self.steps, test_rows: self.test_rows, rows: (self.steps * 16).max(16) };
        let mut say = |text: &str| out.message(text);
        let found = quickstart::quickstart(&self.out, size, &mut say, &mut TrainBar::new(out), &stop)?;
        out.result(&Report(found))
    }
}
