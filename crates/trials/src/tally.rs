//! Counting attempts: the worst figure and where it was, and what failed.

use std::collections::BTreeMap;

/// Most failures that are named.
const NAMED: usize = 20;

/// A figure beside the first one, with a bar of its own.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// What the figure measures.
    pub unit: &'static str,
    /// The largest figure that keeps the promise.
    pub bar: f64,
}

/// What was found of a figure beside the first one.
#[derive(Debug, Clone)]
pub struct Beside {
    /// The figure.
    pub bar: Bar,
    /// Attempts.
    pub trials: u64,
    /// The worst value.
    pub measured: f64,
    /// Where it was.
    pub worst: Option<String>,
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
    /// Figures beside the first one.
    pub beside: Vec<Beside>,
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

    /// One attempt that gave `value` for a figure beside the first one.
    pub fn beside(&mut self, bar: &Bar, subject: impl Into<String>, value: f64) {
        let value = counted(value);
        let place = match self.beside.iter().position(|b| b.bar.unit == bar.unit) {
            Some(place) => place,
            None => {
                self.beside.push(Beside { bar: *bar, trials: 0, measured: 0.0, worst: None });
                self.beside.len() - 1
            }
        };
        let found = &mut self.beside[place];
        found.trials += 1;
        if value > found.measured || found.worst.is_none() {
            found.measured = value;
            found.worst = Some(subject.into());
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
            let bar = Bar { unit: "of another kind", bar: 1.0 };
            order.into_iter().for_each(|v| tally.beside(&bar, format!("{v}"), v));
            order.into_iter().for_each(|v| tally.cell("row", "column", v));
            let beside = &tally.beside[0];
            assert_eq!((beside.trials, beside.measured, beside.worst.as_deref()), (3, f64::INFINITY, Some("NaN")));
            assert_eq!(tally.table["row"]["column"], f64::INFINITY);
        }
    }
}
