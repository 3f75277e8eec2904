//! Counting attempts: the worst figure and where it was, and what failed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most failures that are named.
const NAMED: usize = 20;

/// A further figure of a trial, beside the one that its bar is for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What it is of.
    pub name: String,
    /// The figure; None if it is no finite number.
    pub value: Option<f64>,
    /// What it must meet; None where it is only stated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bar: Option<Bar>,
    /// Where the worst value of several was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<String>,
}

/// What a figure must meet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

impl Figure {
    /// Whether it meets its bar; one that is no number meets none.
    pub fn holds(&self) -> bool {
        match (self.bar, self.value) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(Bar::AtMost(bar)), Some(value)) => value <= bar,
            (Some(Bar::AtLeast(bar)), Some(value)) => value >= bar,
        }
    }
}

/// A figure that is the worst of several values, beside the first one.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// What it measures.
    pub unit: &'static str,
    /// The largest figure that keeps the promise.
    pub bar: f64,
}

/// What a trial found so far.
#[derive(Debug, Default)]
pub struct Tally {
    /// Attempts.
    pub trials: u64,
    /// The figure: failures counted, or the worst value.
    pub measured: f64,
    /// Where the worst value was.
    pub worst: Option<String>,
    /// What did not hold, the first of it.
    pub failures: Vec<String>,
    /// What was tried how often, by name.
    pub counts: BTreeMap<String, u64>,
    /// Further figures.
    pub figures: Vec<Figure>,
    /// The worst value by subject and what was measured of it.
    pub table: BTreeMap<String, BTreeMap<String, f64>>,
}

/// A value as a figure takes it: one that is no number, or below 0, is worse than any.
fn counted(value: f64) -> f64 {
    if value >= 0.0 { value } else { f64::INFINITY }
}

impl Tally {
    /// One attempt at something that holds or does not; the figure is the number of those that did not.
    pub fn held(&mut self, subject: impl Into<String>, held: bool) {
        self.trials += 1;
        if !held {
            self.measured += 1.0;
            self.name(subject.into());
        }
    }

    /// One attempt that gave `value`, at least 0; the figure is the worst one. One that is no number is worse than any.
    pub fn value(&mut self, subject: impl Into<String>, value: f64) {
        self.trials += 1;
        let value = counted(value);
        if value > self.measured || self.worst.is_none() {
            self.measured = value;
            self.worst = Some(subject.into());
        }
    }

    /// One attempt that gave `value` for a figure beside the first one, which is the worst of them.
    pub fn beside(&mut self, limit: &Limit, subject: impl Into<String>, value: f64) {
        let value = counted(value);
        let place = self.figures.iter().position(|figure| figure.name == limit.unit).unwrap_or_else(|| {
            self.figure(limit.unit, 0.0, Some(Bar::AtMost(limit.bar)));
            self.figures.len() - 1
        });
        let figure = &mut self.figures[place];
        // None stands for what is worse than any.
        if figure.worst.is_none() || figure.value.is_some_and(|worst| value > worst) {
            figure.value = value.is_finite().then_some(value);
            figure.worst = Some(subject.into());
        }
    }

    /// Notes `value` in the table, at `row` and `column`; the worst stays.
    pub fn cell(&mut self, row: impl Into<String>, column: impl Into<String>, value: f64) {
        let worst = self.table.entry(row.into()).or_default().entry(column.into()).or_default();
        *worst = worst.max(counted(value));
    }

    /// Counts something by its name, beside the figure.
    pub fn count(&mut self, name: impl Into<String>) {
        *self.counts.entry(name.into()).or_default() += 1;
    }

    /// States a further figure, with the bar that it must meet where it has one.
    pub fn figure(&mut self, name: impl Into<String>, value: f64, bar: Option<Bar>) {
        let value = value.is_finite().then_some(value);
        self.figures.push(Figure { name: name.into(), value, bar, worst: None });
    }

    /// Names something that failed.
    pub fn name(&mut self, failure: String) {
        if self.failures.len() < NAMED {
            self.failures.push(failure);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_worse_than_any() {
        for order in [[1.0, f64::NAN, 2.0], [f64::NAN, 1.0, 2.0], [2.0, 1.0, f64::NAN]] {
            let mut tally = Tally::default();
            order.into_iter().for_each(|v| tally.value(format!("{v}"), v));
            assert_eq!((tally.trials, tally.measured, tally.worst.as_deref()), (3, f64::INFINITY, Some("NaN")));
            let limit = Limit { unit: "of another kind", bar: 1.0 };
            order.into_iter().for_each(|v| tally.beside(&limit, format!("{v}"), v));
            order.into_iter().for_each(|v| tally.cell("row", "column", v));
            let figure = &tally.figures[0];
            assert_eq!((figure.value, figure.worst.as_deref(), figure.holds()), (None, Some("NaN"), false));
            assert_eq!(tally.table["row"]["column"], f64::INFINITY);
        }
    }
}
