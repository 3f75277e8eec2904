//! Documentation made from the code: recipe keys, methods, model families; and from kept records: reliability.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use espalier_models::config::SUPPORTED;
use espalier_train::recipe::{KEYS, adapter_keys, dynamics_keys};
use espalier_trials::record::Table;
use espalier_trials::{Bar, Form, Record, TRIALS, Trial};

const NOTE: &str = "<!-- Made by `cargo xtask docs`; a test compares it with the code. -->\n\n";

/// The fixed lines of a method's head comment.
pub const CARD: [&str; 4] = ["Equation:", "Shapes:", "Source:", "Cost:"];

/// All generated pages, by path under the root.
pub fn pages(root: &Path) -> Vec<(PathBuf, String)> {
    vec![
        ("docs/recipes.md".into(), recipes()),
        ("docs/methods.md".into(), methods(root)),
        ("docs/reliability.md".into(), reliability(root)),
    ]
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn recipes() -> String {
    let mut out = format!(
        "# Recipe keys\n\n{NOTE}A recipe is a TOML file. Every key is also a flag of `espalier train`, `check` and \
         `pretrain`: `max_steps` is\n`--max-steps`, `shuffle` is `--shuffle` and `--no-shuffle`, and a key of the \
         `[adapter]` table is its own name; `method` of the \
         `[dynamics]` table is `--dynamics`, and another key of it `--dynamics-KEY`.\n\n| key | default | what it does |\n|---|---|---|\n"
    );
    for key in KEYS {
        let default = key.default.trim().trim_end_matches(".into()");
        let default = match default {
            "None" | "String::new()" | "DataList::default()" | "OneOrMany::default()" => "",
            other => other.trim_matches('"'),
        };
        let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
        let _ = writeln!(out, "| `{}` | {default} | {} |", key.name, cell(&key.text()));
    }
    out.push_str("\n## The `[adapter]` table\n\n| key | what it does |\n|---|---|\n");
    for key in adapter_keys() {
        let _ = writeln!(out, "| `{}` | {} |", key.name, cell(&key.doc));
    }
    out.push_str("\n## The `[dynamics]` table\n\n| key | what it does |\n|---|---|\n");
    for key in dynamics_keys() {
        let _ = writeln!(out, "| `{}` | {} |", key.name, cell(&key.doc));
    }
    let _ = writeln!(out, "\n## Model families\n\n`model_type` of a `config.json`: {}.", SUPPORTED.join(", "));
    out
}

/// Folders whose files have a head comment with the card's lines, and their titles.
const SHELVES: [(&str, &str); 5] = [
    ("crates/adapters/src/parametrisation", "Parametrisations"),
    ("crates/adapters/src/initialisation", "Initialisations"),
    ("crates/train/src/objective", "Objectives"),
    ("crates/train/src/dynamics", "Dynamics"),
    ("crates/train/src/optimizer", "Optimisers"),
];

/// The files of a shelf, `mod.rs` aside, in order of their names.
pub fn shelf(root: &Path, folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(root.join(folder))
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "rs") && p.file_name().is_some_and(|n| n != "mod.rs"))
        .collect();
    files.sort();
    files
}

/// Paths of all shelves.
pub fn shelves() -> impl Iterator<Item = &'static str> {
    SHELVES.iter().map(|(folder, _)| *folder)
}

/// The head comment of a file, its lines without the marks.
pub fn head(text: &str) -> Vec<&str> {
    text.lines().take_while(|l| l.starts_with("//!")).map(|l| l.trim_start_matches("//!").trim()).collect()
}

fn methods(root: &Path) -> String {
    let mut out = format!("# Methods\n\n{NOTE}Each is one file; the text is its head comment.\n");
    for (folder, title) in SHELVES {
        let _ = write!(out, "\n## {title}\n");
        for path in shelf(root, folder) {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let name = path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let _ = write!(out, "\n### {name}\n\n");
            let mut fixed = false;
            for line in head(&text) {
                let label = CARD.iter().find(|c| line.starts_with(**c));
                if let Some(label) = label {
                    fixed = true;
                    let _ = writeln!(out, "- *{}* {}", label.trim_end_matches(':'), line[label.len()..].trim());
                } else if fixed && !line.is_empty() {
                    let _ = writeln!(out, "  {line}");
                } else {
                    let _ = writeln!(out, "{line}");
                }
            }
        }
    }
    out
}

const RECORDS: &str = "bench/reliability";

/// A count, or a figure with two digits.
fn figure(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value}") } else { format!("{value:.1e}") }
}

/// A figure that may be a share, with four digits where it is near 1.
fn precise(value: f64) -> String {
    if (0.01..10_000.0).contains(&value.abs()) { format!("{value:.4}") } else { figure(value) }
}

/// What the trials found, from their kept records: it does not depend on the machine that makes the page.
fn reliability(root: &Path) -> String {
    let mut out = format!(
        "# Reliability\n\n{NOTE}What is promised, tried and measured. Each figure is of the command beside it, kept by `--record` \
         in `{RECORDS}`; the\nbounded form of every trial runs with the tests. A trial that tries fewer cases than it must has \
         failed, and so has a figure\nthat is no number.\n\n| | what | figure | bar | met | trials | command |\n|---|---|---|---|---|---|---|\n"
    );
    let mut details = String::new();
    for trial in TRIALS {
        let file = root.join(RECORDS).join(format!("{}.json", trial.id));
        let record = std::fs::read_to_string(file).ok().and_then(|text| serde_json::from_str::<Record>(&text).ok());
        let Some(record) = record else {
            let command = trial.command(Form::Full);
            let _ = writeln!(out, "| {} | {} | not recorded | | | | `{command}` |", trial.id, cell(trial.title));
            let _ = write!(details, "{}", heading(trial));
            continue;
        };
        let measured = record.measured.map_or_else(|| "no number".into(), figure);
        let met = if record.passed { "yes" } else { "**no**" };
        let _ = writeln!(
            out,
            "| {} | {} | {} {} | {} | {met} | {} | `{}` |",
            trial.id,
            cell(trial.title),
            measured,
            cell(trial.unit),
            figure(record.bar),
            record.trials,
            record.command
        );
        let _ = write!(details, "{}", heading(trial));
        let _ = write!(details, "{}", table(&record.table));
        if !record.counts.is_empty() {
            let counts: Vec<String> = record.counts.iter().map(|(name, n)| format!("{n} {name}")).collect();
            let _ = write!(details, "\nTried: {}.\n", counts.join("; "));
        }
        if !record.figures.is_empty() {
            details.push_str("\n| figure | value | bar | met |\n|---|---:|---:|---|\n");
            for further in &record.figures {
                let value = further.value.map_or_else(|| "no number".into(), precise);
                let bar = match further.bar {
                    None => String::from("stated"),
                    Some(Bar::AtMost(bar)) => format!("at most {}", precise(bar)),
                    Some(Bar::AtLeast(bar)) => format!("at least {}", precise(bar)),
                };
                let met = match (further.bar, further.holds()) {
                    (None, _) => "",
                    (Some(_), true) => "yes",
                    (Some(_), false) => "**no**",
                };
                let _ = writeln!(details, "| {} | {value} | {bar} | {met} |", cell(&further.name));
            }
        }
        if let Some(worst) = &record.worst {
            let _ = write!(details, "\nThe worst is {worst}.\n");
        }
        for figure in &record.figures {
            if let Some(worst) = &figure.worst {
                let _ = write!(details, "\nThe worst ({}) is {worst}.\n", figure.name);
            }
        }
        for failure in record.failures.iter().chain(&record.error) {
            let _ = write!(details, "\n- did not hold: {failure}\n");
        }
        let _ = write!(details, "\nTook {} s on {}.\n", record.seconds, record.machine);
    }
    out + &details
}

/// The worst values by subject as a table.
fn table(table: &Table) -> String {
    let columns: std::collections::BTreeSet<&String> = table.values().flat_map(|row| row.keys()).collect();
    if columns.is_empty() {
        return String::new();
    }
    let mut out = String::from("\n| |");
    for name in &columns {
        let _ = write!(out, " {} |", cell(name));
    }
    let _ = writeln!(out, "\n|---|{}", "---|".repeat(columns.len()));
    for (subject, row) in table {
        let value = |name: &String| match row.get(name) {
            Some(Some(value)) => figure(*value),
            Some(None) => "no number".to_owned(),
            None => String::new(),
        };
        let cells: Vec<String> = columns.iter().map(|name| value(name)).collect();
        let _ = writeln!(out, "| {} | {} |", cell(subject), cells.join(" | "));
    }
    out
}

fn heading(trial: &Trial) -> String {
    format!("\n## {} {}\n\n{}\n", trial.id, trial.title, trial.claim)
}
