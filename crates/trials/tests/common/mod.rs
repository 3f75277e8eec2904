//! Runs a trial as a test.

use espalier_trials::{Form, Trial, Worker};

pub(crate) fn holds(trial: &Trial, form: Form) {
    let worker = Worker { program: env!("CARGO_BIN_EXE_trial-worker").into(), arguments: Vec::new() };
    let record = trial.record(form, &worker);
    assert!(record.passed, "{record:#?}");
}
