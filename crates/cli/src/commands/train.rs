//! `espalier train`.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use espalier_train::dynamics::DYNAMICS;
use espalier_train::plan::Plan;
use espalier_train::session::{self, SessionOptions, SessionOutcome};
use espalier_train::trainer::Scope;
use espalier_train::{Recipe, Run};
use serde::Serialize;

use crate::output::{Output, bytes, count};
use crate::progress::TrainBar;
use crate::recipe_flags::RecipeFlags;

/// Trains an adapter on a frozen base.
///
/// Everything a run needs is in the recipe; every recipe key is also a flag, so that no recipe file is needed. The run
/// folder holds the resolved recipe, metrics, checkpoints, a report and the adapter in PEFT's layout.
#[derive(Debug, Args)]
pub(crate) struct Train {
    #[command(flatten)]
    flags: RecipeFlags,
    /// Go on with the run in this folder from its newest checkpoint.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["recipe", "overwrite"])]
    resume: Option<PathBuf>,
    /// Begin anew in a folder that holds a run.
    #[arg(long)]
    overwrite: bool,
    /// Run although the estimated memory is more than there is.
    #[arg(long)]
    allow_memory: bool,
}

/// What is printed at the end.
#[derive(Debug, Serialize)]
pub(super) struct Report(pub(super) SessionOutcome);

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SessionOutcome { outcome, adapter, model, tensors, reload, report, .. } = &self.0;
        let how = match (outcome.stopped, outcome.early_stopped) {
            (true, _) => "stopped",
            (_, true) => "ended early",
            _ => "done",
        };
        writeln!(
            f,
            "{how} after {} steps: loss {:.4}{}",
            outcome.steps,
            outcome.loss,
            outcome.best.map_or(String::new(), |(step, loss)| format!(", best evaluation {loss:.4} at step {step}"))
        )?;
        writeln!(
            f,
            "  {:.1} s, {:.0} tokens/s, first step after {:.2} s{}",
            outcome.seconds,
            outcome.tokens_per_s,
            outcome.first_step_s,
            outcome.peak_memory_bytes.map_or(String::new(), |n| format!(", peak memory {}", bytes(n)))
        )?;
        if let Some(path) = adapter.as_ref().or(model.as_ref()) {
            writeln!(
                f,
                "  {} ({tensors} tensors): {}",
                if adapter.is_some() { "adapter" } else { "model" },
                path.display()
            )?;
        }
        if let Some(live) = &outcome.live {
            writeln!(f, "  {live}")?;
        }
        if let Some(reload) = reload {
            let what = if adapter.is_some() { "adapter" } else { "model" };
            writeln!(f, "  {what} read back: {reload}")?;
        }
        write!(f, "  report: {}", report.display())
    }
}

/// The plan in a few lines.
pub(super) fn summary(plan: &Plan) -> String {
    let mut lines = vec![format!(
        "{} on {} ({} parameters, {} {}): {} sites, {} trainable parameters",
        plan.method,
        plan.family,
        count(plan.base_parameters),
        plan.device,
        plan.dtype,
        plan.sites.len(),
        count(plan.trainable_parameters),
    )];
    if plan.dynamics != DYNAMICS[0] {
        lines.push(format!("  dynamics: {}", plan.dynamics));
    }
    lines.extend(plan.base_note.iter().map(|note| format!("  note: {note}")));
    for (pattern, n) in &plan.patterns {
        lines.push(format!("  {pattern}: {n} modules"));
    }
    for source in &plan.data {
        let r = &source.report;
        let refused: u64 = r.refused.values().sum();
        lines.push(format!(
            "  {}: {} of {} rows used, {refused} refused, {} cut, {} tokens",
            source.path, r.used, r.rows, r.truncated, r.tokens
        ));
        lines.extend(r.refused.iter().map(|(reason, n)| format!("    {n} refused: {reason}")));
        lines.extend(r.notes.iter().map(|note| format!("    note: {note}")));
    }
    lines.push(format!(
        "  {} steps; {:.0} % of tokens are trained on; memory about {}, of which {} is held{}",
        plan.steps,
        100.0 * plan.trained_share,
        bytes(plan.memory.total),
        bytes(plan.memory.held),
        plan.memory.available.map_or(String::new(), |n| format!("; {} more can be had", bytes(n)))
    ));
    lines.join("\n")
}

/// A flag that Ctrl-C and a termination signal set; a second one ends the process.
pub(super) fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("setting up Ctrl-C")?;
    Ok(stop)
}

/// Runs a prepared run and prints how it went.
pub(super) fn execute(out: Output, mut run: Run, options: &SessionOptions) -> Result<()> {
    let plan = run.plan(0)?;
    out.message(summary(&plan));
    let stop = stop_flag()?;
    let outcome = session::run(&mut run, &plan, options, &mut TrainBar::new(out), &stop)?;
    out.result(&Report(outcome))
}

/// The command as typed.
pub(super) fn command_line() -> String {
    let quoted = |arg: String| if arg.contains([' ', '"', '\'', '$']) { format!("'{arg}'") } else { arg };
    let args: Vec<String> = std::env::args().skip(1).map(quoted).collect();
    format!("espalier {}", args.join(" "))
}

impl Train {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let resume = self.resume.is_some();
        let recipe = match self.resume {
            Some(folder) => {
                let mut flags = self.flags;
                flags.file = Some(folder.join("recipe.toml"));
                Recipe { out: folder.display().to_string(), ..flags.recipe()? }
            }
            None => self.flags.recipe()?,
        };
        let options = SessionOptions {
            scope: Scope::Adapter,
            resume,
            overwrite: self.overwrite,
            allow_memory: self.allow_memory,
            command: command_line(),
        };
        execute(out, Run::prepare_again(recipe, resume)?, &options)
    }
}
