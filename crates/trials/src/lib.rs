//! Trials: what is promised of adapters and runs, each promise with a figure that is measured here and a bar that it must
//! meet.
//!
//! A trial is one file and one line of the list in `with_trials!`. What it is tried on comes from lists of the product
//! (methods by their examples) and from the golden files, so that a new method or a new file is tried without being named.
//! A trial that tried less than it says fails, and a figure that is no number is worse than any bar. Nothing prints here:
//! `cargo xtask trial` and the tests of this crate do.

pub mod made;
pub mod record;
pub mod runs;
pub mod subject;
pub mod tally;
pub mod worker;
mod writers;

use std::path::{Path, PathBuf};
use std::time::Instant;

pub use record::Record;
pub use tally::Tally;
pub use worker::Worker;

/// The allocator of the programs that trials run in, as that of the command: a run's memory is told from its counts.
#[global_allocator]
static ALLOCATOR: espalier_train::memory::Counting = espalier_train::memory::Counting;

/// Calls the macro `then` with the list of all trials: the one list.
#[macro_export]
macro_rules! with_trials {
    ($then:ident) => {
        $then! {
            round_trips;
            merged;
            unmerged;
            same_bits;
            mutated_adapters;
            live_tensors;
            killed_runs;
            write_faults;
            changed_runs;
            broken_runs;
            memory_told;
        }
    };
}

macro_rules! registered {
    ($($module:ident;)*) => {
        $(pub mod $module;)*

        /// All trials, in the order of their ids.
        pub static TRIALS: &[&Trial] = &[$(&$module::TRIAL),*];
    };
}

with_trials!(registered);

/// How much is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A share that runs within seconds, as a test.
    Bounded,
    /// All of it.
    Full,
}

/// A promise, and how it is tried.
#[derive(Debug)]
pub struct Trial {
    /// Short name, as `R-18`.
    pub id: &'static str,
    /// What is tried, in a few words.
    pub title: &'static str,
    /// What is promised, and of what.
    pub claim: &'static str,
    /// What the figure counts or measures.
    pub unit: &'static str,
    /// The largest figure that keeps the promise.
    pub bar: f64,
    /// Fewest attempts of the bounded form.
    pub bounded: u64,
    /// Fewest attempts of the full form.
    pub full: u64,
    /// Tries it.
    pub run: fn(&Scope<'_>, &mut Tally) -> anyhow::Result<()>,
}

/// What a trial is given.
#[derive(Debug)]
pub struct Scope<'a> {
    /// How much to try.
    pub form: Form,
    /// Fewest attempts.
    pub least: u64,
    /// A folder of its own.
    pub scratch: &'a Path,
    /// Starts processes of this program.
    pub worker: &'a Worker,
}

impl Scope<'_> {
    /// Whether all of it is tried.
    pub fn is_full(&self) -> bool {
        self.form == Form::Full
    }
}

impl Trial {
    /// The trial called `id`, in capitals or not.
    pub fn by_id(id: &str) -> Option<&'static Self> {
        TRIALS.iter().copied().find(|trial| trial.id.eq_ignore_ascii_case(id))
    }

    /// The command that gives the figure.
    pub fn command(&self, form: Form) -> String {
        let full = if form == Form::Full { " --full" } else { "" };
        format!("cargo xtask trial {}{full}", self.id)
    }

    /// Tries the promise. Whatever goes wrong is in the record, which did not pass then.
    pub fn record(&self, form: Form, worker: &Worker) -> Record {
        let began = Instant::now();
        let least = if form == Form::Full { self.full } else { self.bounded };
        let mut tally = Tally::default();
        let run = |tally: &mut Tally| -> anyhow::Result<()> {
            let scratch = tempfile::tempdir()?;
            (self.run)(&Scope { form, least, scratch: scratch.path(), worker }, tally)
        };
        let error = run(&mut tally).err().map(|e| format!("{e:#}"));
        Record::new(self, form, least, tally, error, began.elapsed())
    }
}

/// The repository's root, whose golden files are tried.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
