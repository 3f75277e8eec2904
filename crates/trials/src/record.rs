//! What a trial found, as it is kept in `bench/reliability/` and shown in `docs/reliability.md`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Figure, Form, Tally, Trial};

/// The outcome of a trial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Short name.
    pub id: String,
    /// What was tried, in a few words.
    pub title: String,
    /// What is promised.
    pub claim: String,
    /// The figure; None if it is no finite number.
    pub measured: Option<f64>,
    /// What the figure counts or measures.
    pub unit: String,
    /// The largest figure that keeps the promise.
    pub bar: f64,
    /// Attempts.
    pub trials: u64,
    /// Fewest attempts that count.
    pub least: u64,
    /// Whether enough was tried, nothing went wrong and the bar is met.
    pub passed: bool,
    /// The command that gives the figure.
    pub command: String,
    /// Where the worst value was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<String>,
    /// What was tried how often.
    #[serde(default)]
    pub counts: BTreeMap<String, u64>,
    /// Further figures, each with its own bar.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub figures: Vec<Figure>,
    /// What did not hold, the first of it.
    #[serde(default)]
    pub failures: Vec<String>,
    /// What ended the trial before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Seconds it took.
    pub seconds: f64,
    /// Where it ran: threads, vector instructions, architecture.
    pub machine: String,
}

impl Record {
    /// The outcome of `trial`.
    pub(crate) fn new(
        trial: &Trial,
        form: Form,
        least: u64,
        tally: Tally,
        error: Option<String>,
        took: Duration,
    ) -> Self {
        let enough = tally.trials > 0 && tally.trials >= least;
        let machine = format!(
            "{} threads, {}, {}-{}",
            rayon::current_num_threads(),
            espalier_kernels::instructions().unwrap_or("unknown instructions"),
            std::env::consts::ARCH,
            std::env::consts::OS
        );
        Self {
            id: trial.id.into(),
            title: trial.title.into(),
            claim: trial.claim.into(),
            measured: tally.measured.is_finite().then_some(tally.measured),
            unit: trial.unit.into(),
            bar: trial.bar,
            trials: tally.trials,
            least,
            passed: enough && error.is_none() && tally.measured <= trial.bar && tally.figures.iter().all(Figure::holds),
            command: trial.command(form),
            worst: tally.worst,
            counts: tally.counts,
            figures: tally.figures,
            failures: tally.failures,
            error,
            seconds: (took.as_secs_f64() * 10.0).round() / 10.0,
            machine,
        }
    }

    /// The record as a file: JSON on several lines.
    ///
    /// # Errors
    /// If it cannot be written as JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(fill: fn(&mut Tally), error: Option<String>) -> Record {
        let trial =
            Trial { id: "R-00", title: "", claim: "", unit: "", bar: 1.0, bounded: 0, full: 2, run: |_, _| Ok(()) };
        let mut tally = Tally::default();
        fill(&mut tally);
        Record::new(&trial, Form::Bounded, trial.bounded, tally, error, Duration::ZERO)
    }

    #[test]
    fn what_tried_nothing_or_is_no_number_or_ended_early_fails() {
        assert!(!of(|_| (), None).passed);
        assert!(of(|t| t.value("a", 1.0), None).passed);
        assert!(!of(|t| t.value("a", 1.1), None).passed);
        assert!(!of(|t| t.value("a", 1.0), Some("ended".into())).passed);
        use crate::Bar::{AtLeast, AtMost};
        for (value, bar, passed) in [
            (1.0, Some(AtMost(1.0)), true),
            (1.1, Some(AtMost(1.0)), false),
            (0.9, Some(AtLeast(0.98)), false),
            (0.98, Some(AtLeast(0.98)), true),
            (f64::NAN, Some(AtMost(1.0)), false),
            (f64::NAN, None, true),
        ] {
            let figure = crate::Figure { name: String::new(), value: value.is_finite().then_some(value), bar };
            assert_eq!(figure.holds(), passed, "{figure:?}");
        }
        let further = |t: &mut Tally| {
            t.value("a", 1.0);
            t.figure("b", 2.0, Some(AtMost(1.0)));
        };
        assert!(!of(further, None).passed);
        let nothing = of(|t| t.value("a", f64::NAN), None);
        assert!(!nothing.passed && nothing.measured.is_none());
        assert!(
            of(|t| t.held("a", false), None).passed && !of(|t| (0..2).for_each(|_| t.held("a", false)), None).passed
        );
    }
}
