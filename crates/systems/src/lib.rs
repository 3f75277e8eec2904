//! Published systems: what each is, where its code is, and the checks that reproduce its claims.
//!
//! A system is one file here and one line of the list in [`catalogue`]. Its checks run the code that everyone runs, on maps and
//! models small enough for two processors: *exact* ones compare with closed forms and must hold; *behavioural* ones measure what the
//! paper claims, over several seeds and against baselines tuned as well, and say what was found whichever way it went. Nothing
//! prints here; `espalier systems` and `espalier reproduce` do.

pub mod catalogue;
pub mod lab;
pub mod map;

use std::time::Instant;

use anyhow::{Result, bail};
use serde::Serialize;

pub use catalogue::SYSTEMS;
pub use lab::{Check, Kind, Lab};

/// How much of a system there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// All of it.
    Works,
    /// A part; `missing` says what is not there.
    Partly,
    /// Nothing yet.
    NotYet,
}

/// A published system.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct System {
    /// Short name.
    pub name: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// Where the paper is.
    pub paper: &'static str,
    /// The axis or axes that it is a point of.
    pub axis: &'static str,
    /// Files that hold its idea.
    pub code: &'static [&'static str],
    /// How much of it there is.
    pub status: Status,
    /// What is not there.
    pub missing: &'static str,
    /// Its checks.
    #[serde(skip)]
    pub checks: Option<fn(&mut Lab) -> Result<()>>,
}

/// What came of a system's checks.
#[derive(Debug, Serialize)]
pub struct Reproduction {
    /// The system.
    pub system: &'static str,
    /// Whether only the exact checks were run.
    pub quick: bool,
    /// Each check.
    pub checks: Vec<Check>,
    /// Whether all exact checks passed, of which there was at least one.
    pub passed: bool,
    /// Seconds it took.
    pub seconds: f64,
}

impl System {
    /// The system called `name`.
    ///
    /// # Errors
    /// If there is none; names the nearest.
    pub fn by_name(name: &str) -> Result<&'static Self> {
        let names: Vec<&str> = SYSTEMS.iter().map(|system| system.name).collect();
        match SYSTEMS.iter().find(|system| system.name == name) {
            Some(system) => Ok(system),
            None => bail!("system: {}", espalier_adapters::config::unknown_value(name, &names)),
        }
    }

    /// Runs its checks: the exact ones alone if `quick`.
    ///
    /// # Errors
    /// If there are none yet, or one of them cannot be run.
    pub fn reproduce(&self, quick: bool) -> Result<Reproduction> {
        let Some(checks) = self.checks else {
            bail!("{}: nothing to reproduce yet ({}); `espalier systems` lists what is there", self.name, self.missing)
        };
        let began = Instant::now();
        let mut lab = Lab::new(quick);
        checks(&mut lab)?;
        let checks = lab.into_checks();
        let exact = || checks.iter().filter(|check| check.kind == Kind::Exact);
        let passed = exact().count() > 0 && exact().all(|check| check.passed);
        Ok(Reproduction { system: self.name, quick, checks, passed, seconds: began.elapsed().as_secs_f64() })
    }
}
