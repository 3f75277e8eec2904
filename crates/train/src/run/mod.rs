//! What a training run leaves behind: one folder, readable by people and by tools.
//!
//! ```text
//! RUN/
//!   recipe.toml                           the resolved recipe: every key with the value that was used
//!   metrics.jsonl                         one JSON object per optimiser step, one per evaluation   [`metrics`]
//!   events.out.tfevents.SECS.HOST.PID     the same scalars for TensorBoard                         [`tensorboard`]
//!   report.html                           self-contained report: facts, curves, tables, samples    [`report`], [`plot`]
//!   starts.safetensors                    what the adapter started with, where that was made from data
//!   checkpoints/                          adapter and trainer state per saved step
//!   adapter/                              the trained adapter in PEFT's layout
//!   README.md                             model card of the adapter, when the folder holds one     [`model_card`]
//! ```
//!
//! `metrics.jsonl` grows by whole lines, event files by whole records; everything else is replaced as one file
//! (written beside the target, synced, renamed), so a run that is killed leaves no half-written document. On resume at
//! step N the metrics after N are dropped and TensorBoard is told to drop them too.

use std::path::{Path, PathBuf};

mod error;
pub mod metrics;
pub mod model_card;
pub mod plot;
pub mod report;
pub mod tensorboard;

pub use error::RunError;

/// The paths of a run folder. Holds no open file and creates nothing by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    /// The run folder at `root`; the folder need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Creates the folder and its `checkpoints/`; does nothing where they exist.
    ///
    /// # Errors
    /// [`RunError::Io`] if a folder cannot be created.
    pub fn create(&self) -> Result<(), RunError> {
        let folder = self.checkpoints();
        std::fs::create_dir_all(&folder).map_err(|e| RunError::io("create folder", &folder, e))
    }

    /// The folder itself; TensorBoard event files lie directly in it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `recipe.toml`: the resolved recipe.
    pub fn recipe(&self) -> PathBuf {
        self.root.join("recipe.toml")
    }

    /// `metrics.jsonl`.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// `report.html`.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// `adapter/`: the trained adapter.
    pub fn adapter(&self) -> PathBuf {
        self.root.join("adapter")
    }

    /// `starts.safetensors`: what the adapter started with, where that was made from the data.
    pub fn starts(&self) -> PathBuf {
        self.root.join("starts.safetensors")
    }

    /// `checkpoints/`.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }
}
