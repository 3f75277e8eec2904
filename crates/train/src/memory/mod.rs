//! How much memory a run will need, before its first step; whether there is so much; and how much it uses.
//!
//! What is told is the peak of the resident memory from the load of the model to the end of the run, as the system counts it
//! (`VmHWM` on Linux), with the program, the data and the tokenizer in it. Weight files are read, not mapped, so that they do
//! not count beside the weights; token stores are mapped, and count as far as they are in memory when the run is told.

mod counting;
mod formula;
mod rehearsal;
mod system;

pub use counting::{Counting, in_use};
use serde::{Deserialize, Serialize};
pub use system::{available, available_on, keep_freed, peak, peak_on, resident};

use system::file_pages;

use crate::trainer::Run;
use crate::{Error, Result};

/// An estimate of the peak, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Frozen weights.
    pub weights: u64,
    /// Trained parameters, their gradients and the optimiser's moments.
    pub trained: u64,
    /// What the blocks keep for the backward pass.
    pub activations: u64,
    /// Scores of the head and their gradient, and scratch of the widest block.
    pub transient: u64,
    /// The program itself.
    pub program: u64,
    /// Sum.
    pub total: u64,
    /// What of it is in use already; 0 where the memory is a device's.
    pub held: u64,
    /// What can still be had, where it can be told.
    pub available: Option<u64>,
    /// Whether it was told from a rehearsal whose allocations were counted; else from formulas, which are coarser.
    pub rehearsed: bool,
}

impl Estimate {
    /// Whether the run fits into what is there.
    ///
    /// # Errors
    /// [`Error::Memory`] if it does not.
    pub fn check(&self) -> Result<()> {
        let wanted = self.total.saturating_sub(self.held);
        match self.available {
            Some(available) if wanted > available => Err(Error::Memory {
                total: self.total,
                held: self.held,
                available,
                activations: self.activations + self.transient,
            }),
            _ => Ok(()),
        }
    }
}

/// What lies unused between buffers of unlike sizes, as a share of what the steps take. The one figure here that was measured
/// on runs and not counted.
const GAPS: f64 = 1.0 / 32.0;

/// Estimates the peak of a run.
///
/// # Errors
/// If a batch cannot be read, or the model refuses it.
pub fn estimate(run: &mut Run) -> Result<Estimate> {
    let longest = run.data.stores.iter().flat_map(|s| s.lengths()).max().unwrap_or(0);
    let device = run.model.device().clone();
    let mut told = formula::estimate(&run.recipe, &mut run.model, &run.parameters, longest)?;
    told.available = available_on(&device)?;
    if device.is_cpu() && in_use().is_some() {
        system::give_back();
        let before = resident().zip(file_pages());
        if let (Some((resident, file)), Some(growth)) = (before, rehearsal::growth(run)?) {
            let kept = growth.kept.max(0.0) as u64;
            let growth = (growth.peak.max(0.0) * (1.0 + GAPS)) as u64;
            // The rehearsal brought the code of a step into memory.
            let code = file_pages().unwrap_or(file).saturating_sub(file);
            let total = (resident + code + growth).max(peak().unwrap_or(0));
            // The parameters themselves are there already.
            let parameters = 4 * run.parameters.trainable_count() as u64;
            told = Estimate {
                activations: kept,
                transient: growth.saturating_sub(kept + told.trained - parameters),
                program: (total - growth).saturating_sub(told.weights + parameters),
                total,
                held: resident,
                rehearsed: true,
                ..told
            };
        }
    }
    Ok(told)
}
