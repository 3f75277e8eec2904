//! `cargo xtask trial`: tries what is promised, prints what was found and keeps it.

use std::path::Path;
use std::process::ExitCode;

use espalier_trials::{Form, Record, TRIALS, Trial, Worker};

/// The hidden command by which this program starts itself as a worker of a trial.
pub(crate) const WORKER: &str = "trial-worker";

const USAGE: &str = "usage: cargo xtask trial [ID...|all] [--full] [--json] [--record]";

/// Lists the trials, or runs those named. 0: all passed; 1: one did not; 2: wrong command.
pub(crate) fn command(root: &Path, arguments: &[String]) -> ExitCode {
    let (flags, ids): (Vec<&str>, Vec<&str>) = arguments.iter().map(String::as_str).partition(|a| a.starts_with('-'));
    if let Some(flag) = flags.iter().find(|flag| !["--full", "--json", "--record"].contains(flag)) {
        eprintln!("{flag} is not known\n{USAGE}");
        return ExitCode::from(2);
    }
    let has = |flag: &str| flags.contains(&flag);
    if ids.is_empty() {
        for trial in TRIALS {
            println!("{}  {} (bounded {}, full {})", trial.id, trial.title, trial.bounded, trial.full);
        }
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let mut trials = Vec::new();
    for id in ids {
        match (id, Trial::by_id(id)) {
            ("all", _) => trials.extend(TRIALS.iter().copied()),
            (_, Some(trial)) => trials.push(trial),
            _ => {
                eprintln!("{id} is no trial; `cargo xtask trial` lists them");
                return ExitCode::from(2);
            }
        }
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
    };
    let worker = Worker { program, arguments: vec![WORKER.into()] };
    let form = if has("--full") { Form::Full } else { Form::Bounded };
    let mut passed = true;
    for trial in trials {
        let record = trial.record(form, &worker);
        passed &= record.passed;
        if let Err(e) = show(root, &record, has("--json"), has("--record")) {
            eprintln!("{}: {e}", record.id);
            passed = false;
        }
    }
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show(root: &Path, record: &Record, json: bool, keep: bool) -> std::io::Result<()> {
    let text = record.to_json()?;
    if json {
        println!("{}", serde_json::to_string(record)?);
    } else {
        let figure = record.measured.map_or_else(|| "no number".to_owned(), |m| format!("{m:.3e}"));
        let mark = if record.passed { "passed" } else { "FAILED" };
        println!(
            "{} {mark}: {} {figure}, bar {:.0e}, {} trials (at least {}), {} s",
            record.id, record.unit, record.bar, record.trials, record.least, record.seconds
        );
        for further in &record.figures {
            let value = further.value.map_or_else(|| "no number".to_owned(), |v| format!("{v:.4e}"));
            let mark = if further.holds() { "" } else { "FAILED: " };
            println!("    {mark}{}: {value}, bar {:?}", further.name, further.bar);
        }
        for (subject, row) in &record.table {
            let cell = |(name, value): (&String, &Option<f64>)| match value {
                Some(value) => format!("{name} {value:.1e}"),
                None => format!("{name} no number"),
            };
            println!("    {subject}: {}", row.iter().map(cell).collect::<Vec<_>>().join(", "));
        }
        record.counts.iter().for_each(|(name, n)| println!("    {n} {name}"));
        record.failures.iter().chain(&record.error).for_each(|failure| println!("    FAILED: {failure}"));
    }
    if keep {
        let folder = root.join("bench/reliability");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(format!("{}.json", record.id)), text)?;
    }
    Ok(())
}
