//! Where checks are written down.

use serde::Serialize;

/// Seeds of behavioural checks.
pub const SEEDS: [u64; 3] = [1, 2, 3];

/// What a check is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A closed form that must hold.
    Exact,
    /// A measurement of what the paper claims; it may turn out otherwise at this size.
    Behaviour,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// Short name.
    pub name: String,
    /// What is claimed.
    pub claim: String,
    /// What was found.
    pub measured: f64,
    /// What it is held to, as `<= 1e-6`.
    pub threshold: String,
    /// Whether it holds. A figure that is no number never does.
    pub passed: bool,
    /// What it is of.
    pub kind: Kind,
    /// Figures beside it: spread over seeds, baselines.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// A run of one system's checks.
#[derive(Debug)]
pub struct Lab {
    quick: bool,
    checks: Vec<Check>,
}

impl Lab {
    pub(crate) fn new(quick: bool) -> Self {
        Self { quick, checks: Vec::new() }
    }

    pub(crate) fn into_checks(self) -> Vec<Check> {
        self.checks
    }

    /// Whether behavioural checks are left out.
    pub fn is_quick(&self) -> bool {
        self.quick
    }

    fn note(
        &mut self,
        kind: Kind,
        (name, claim): (&str, &str),
        measured: f64,
        bar: String,
        passed: bool,
    ) -> &mut Check {
        let passed = passed && measured.is_finite();
        let (name, claim) = (name.to_owned(), claim.to_owned());
        let at = self.checks.len();
        self.checks.push(Check { name, claim, measured, threshold: bar, passed, kind, note: String::new() });
        &mut self.checks[at]
    }

    /// An exact check: `measured` is at most `bar`.
    pub fn at_most(&mut self, name: &str, claim: &str, measured: f64, bar: f64) {
        self.note(Kind::Exact, (name, claim), measured, format!("<= {bar:e}"), measured <= bar);
    }

    /// An exact check: `measured` is at least `bar`.
    pub fn at_least(&mut self, name: &str, claim: &str, measured: f64, bar: f64) {
        self.note(Kind::Exact, (name, claim), measured, format!(">= {bar:e}"), measured >= bar);
    }

    /// An exact check: a count is the one expected.
    pub fn counts(&mut self, name: &str, claim: &str, measured: usize, expected: usize) {
        self.note(Kind::Exact, (name, claim), measured as f64, format!("= {expected}"), measured == expected);
    }

    /// An exact check: something holds.
    pub fn holds(&mut self, name: &str, claim: &str, holds: bool) {
        self.note(Kind::Exact, (name, claim), f64::from(u8::from(holds)), "= 1".into(), holds);
    }

    /// A behavioural check: the mean of `measured` over seeds is below the mean of `other`, the claim's baseline.
    pub fn below(&mut self, name: &str, claim: &str, measured: &[f64], other: (&str, &[f64])) {
        let ((mean, spread), (theirs, their_spread)) = (mean_and_spread(measured), mean_and_spread(other.1));
        let bar = format!("< {theirs:.4} ({})", other.0);
        let check = self.note(Kind::Behaviour, (name, claim), mean, bar, mean < theirs);
        check.note = format!(
            "spread {spread:.4} over {} seeds; {} {theirs:.4}, spread {their_spread:.4}",
            measured.len(),
            other.0
        );
    }
}

/// Mean and sample standard deviation.
pub fn mean_and_spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let square = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, square.sqrt())
}
