//! Progress bars with loss, speed, memory and time left; silent where nobody watches.

use std::path::Path;
use std::time::Duration;

use espalier_train::observer::Observer;
use espalier_train::run::metrics::{EvalRecord, StepRecord};
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::{Output, bytes};

/// A bar of `total` things called `unit`.
pub(crate) fn bar(output: Output, total: u64, unit: &str) -> ProgressBar {
    if output.is_json() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    let template = format!("{{bar:30.cyan/blue}} {{pos}}/{{len}} {unit}  {{msg}}  [{{elapsed}} < {{eta}}]");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Shows a run.
#[derive(Debug)]
pub(crate) struct TrainBar {
    output: Output,
    bar: ProgressBar,
    eval: Option<f64>,
    smoothed: Option<f64>,
}

impl TrainBar {
    pub(crate) fn new(output: Output) -> Self {
        Self { output, bar: ProgressBar::hidden(), eval: None, smoothed: None }
    }

    fn say(&self, text: &str) {
        if !self.output.is_json() {
            self.bar.suspend(|| self.output.message(text));
        }
    }
}

impl Observer for TrainBar {
    fn start(&mut self, step: usize, total: usize) {
        self.bar = bar(self.output, total as u64, "steps");
        self.bar.set_position(step as u64);
        self.bar.reset_eta();
    }

    fn step(&mut self, record: &StepRecord) -> espalier_train::Result<()> {
        let loss = self.smoothed.map_or(record.loss, |old| 0.9 * old + 0.1 * record.loss);
        self.smoothed = Some(loss);
        let eval = self.eval.map_or(String::new(), |loss| format!("  eval {loss:.4}"));
        let memory = record.memory_bytes.map_or(String::new(), |n| format!("  {}", bytes(n)));
        self.bar.set_message(format!("loss {loss:.4}{eval}  {:.0} tok/s{memory}", record.tokens_per_s));
        self.bar.set_position(record.step);
        Ok(())
    }

    fn evaluation(&mut self, record: &EvalRecord) -> espalier_train::Result<()> {
        self.eval = Some(record.eval_loss);
        Ok(())
    }

    fn checkpoint(&mut self, _path: &Path) {}

    fn notice(&mut self, text: &str) {
        self.say(&format!("note: {text}"));
    }
}

impl Drop for TrainBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
