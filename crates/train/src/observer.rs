//! Who watches a run: metrics files, progress bars, tests.

use std::path::Path;

use crate::Result;
use crate::run::metrics::{EvalRecord, StepRecord};

/// Told what happens in a run. An error of an observer that keeps records ends the run.
pub trait Observer {
    /// The run begins after `step` steps of `total`.
    fn start(&mut self, step: usize, total: usize) {
        let _ = (step, total);
    }

    /// A step was taken.
    ///
    /// # Errors
    /// If the record cannot be kept.
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        let _ = record;
        Ok(())
    }

    /// An evaluation was made.
    ///
    /// # Errors
    /// If the record cannot be kept.
    fn evaluation(&mut self, record: &EvalRecord) -> Result<()> {
        let _ = record;
        Ok(())
    }

    /// A checkpoint was written.
    fn checkpoint(&mut self, path: &Path) {
        let _ = path;
    }

    /// Something the user should know.
    fn notice(&mut self, text: &str) {
        let _ = text;
    }
}

/// Watches nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
