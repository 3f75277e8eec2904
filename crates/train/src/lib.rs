//! Training: recipes, the loop, objectives, optimisers, dynamics, checkpoints and run folders.
//!
//! [`recipe::Recipe`] says everything about a run; [`trainer::Run`] is the run; [`session`] runs it in a run folder. The
//! trainer names neither a method nor a model: it moves the parameters of a [`espalier_adapters::ParameterMap`].

pub mod bench;
pub mod checkpoint;
pub mod compare;
pub mod dynamics;
pub mod error;
pub mod evidence;
pub mod export;
pub mod gain;
mod gradients;
pub mod identity;
pub mod kept;
pub mod live;
pub mod memory;
pub mod merge;
pub mod moved_base;
mod named;
pub mod objective;
pub mod observer;
pub mod optimizer;
pub mod pairs;
pub mod plan;
pub mod pool;
pub mod quickstart;
pub mod recipe;
pub mod reload;
pub mod resident;
pub mod run;
pub mod session;
pub mod setup;
pub mod small;
pub mod tape;
pub mod trainer;
mod training;
pub mod verify;

pub use error::{Error, Result};
pub use observer::{Observer, Silent};
pub use recipe::Recipe;
pub use trainer::{Outcome, Run};

/// Seconds since this process started, as the system counts them; since the first call where it does not say.
pub fn process_seconds() -> f64 {
    use std::sync::OnceLock;
    use std::time::Instant;
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let since_first = FIRST.get_or_init(Instant::now).elapsed().as_secs_f64();
    let age = || -> Option<f64> {
        let uptime: f64 = std::fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let start: f64 = stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()?;
        // The kernel counts process start in ticks of 1/100 s on all platforms that have /proc.
        Some(uptime - start / 100.0)
    };
    age().unwrap_or(since_first)
}
