//! readers of files of others come back from any bytes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::fuzz::{TARGETS, Target, input};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-36",
    title: "Fuzzed readers",
    claim: "From any bytes a reader comes back with a value or an error: no panic, no end of the process, nothing slower than ten \
            seconds; in the full form the memory of the process grows by no more than 1 GiB. Inputs are well-formed files \
            (golden adapters and models, shipped templates, recipes of every method, rows of every kind) with one to six \
            things wrong, at random and where the structure is: lengths, numbers at the edges, nesting, words of the format. \
            What is read is also used: tensors loaded, settings attached to a model, text encoded, conversations rendered. \
            This is a seeded mutator without feedback from coverage; `fuzz/` has the same functions for `cargo fuzz`.",
    unit: "inputs that crashed or hung",
    bar: 0.0,
    bounded: 2000,
    full: 10_000,
    run,
};

/// Longest that one input may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time of one target in the full form; each has a share of inputs whatever the time.
const TIME: Duration = Duration::from_secs(40);
/// Most memory by which a target may raise that of the process, in MiB.
const MOST: u64 = 1024;

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let least = scope.least.div_ceil(TARGETS.len() as u64);
    for target in TARGETS {
        let corpus = (target.corpus)()?;
        anyhow::ensure!(!corpus.is_empty(), "{}: nothing to start from", target.name);
        for bytes in &corpus {
            once(target, bytes, "a well-formed input", tally);
        }
        let before = reset_peak();
        let began = Instant::now();
        let mut slowest = Duration::ZERO;
        let mut n = 0;
        while n < least || scope.is_full() && began.elapsed() < TIME {
            let took = once(target, &input(target, &corpus, n), &format!("input {n}"), tally);
            slowest = slowest.max(took);
            n += 1;
        }
        let name = target.name;
        tally.counts.insert(format!("executions of {name}"), n);
        if scope.is_full() {
            tally.counts.insert(format!("slowest of {name}, ms"), slowest.as_millis() as u64);
            if let (Some(before), Some(peak)) = (before, peak()) {
                tally.counts.insert(format!("peak memory of {name}, MiB"), peak);
                tally.held(format!("{name}: memory from {before} to {peak} MiB"), peak.saturating_sub(before) <= MOST);
            }
        }
    }
    Ok(())
}

fn once(target: &Target, bytes: &[u8], what: &str, tally: &mut Tally) -> Duration {
    let began = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    let took = began.elapsed();
    let held = outcome.is_ok() && took < PATIENCE;
    let name = if held { String::new() } else { format!("{}, {what}: panicked {}, {took:?}", target.name, outcome.is_err()) };
    tally.held(name, held);
    took
}

/// Highest memory of the process since the last reset, in MiB; None where the system does not tell.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

/// Begins a new peak; gives where it begins.
fn reset_peak() -> Option<u64> {
    std::fs::write("/proc/self/clear_refs", "5").ok()?;
    peak()
}
