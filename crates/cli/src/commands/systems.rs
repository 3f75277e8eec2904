//! `espalier systems` and `espalier reproduce`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use espalier_systems::{Kind, Reproduction, SYSTEMS, Status, System};
use serde::Serialize;

use crate::output::Output;

/// Lists the published systems: what each is, on which axis, where its code is, and how much of it there is.
#[derive(Debug, Args)]
pub(crate) struct Systems {}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Listing(&'static [System]);

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |status| self.0.iter().filter(move |system| system.status == status);
        for (status, word) in [(Status::Works, "works"), (Status::Partly, "partly"), (Status::NotYet, "not yet")] {
            for system in of(status) {
                writeln!(f, "{word:8} {:16} {:28} {}", system.name, system.axis, system.title)?;
                let code = system.code.join(", ");
                match (code.is_empty(), system.status) {
                    (false, Status::Partly) => writeln!(f, "{:26}{code}; missing: {}", "", system.missing)?,
                    (false, _) => writeln!(f, "{:26}{code}", "")?,
                    (true, _) => {}
                }
            }
        }
        write!(
            f,
            "{} systems: {} work, {} partly, {} not yet",
            self.0.len(),
            of(Status::Works).count(),
            of(Status::Partly).count(),
            of(Status::NotYet).count()
        )
    }
}

impl Systems {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        out.result(&Listing(SYSTEMS))
    }
}

/// Runs the checks of one system. Exit code 1 if an exact one fails.
#[derive(Debug, Args)]
pub(crate) struct Reproduce {
    /// Name of the system, as `espalier systems` lists it.
    name: String,
    /// Only the exact checks, which take seconds.
    #[arg(long)]
    quick: bool,
    /// Folder for the results as JSON [default: reproductions].
    #[arg(long, default_value = "reproductions", hide_default_value = true)]
    out: PathBuf,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Found(Reproduction);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.0;
        for check in &found.checks {
            let word = match (check.passed, check.kind) {
                (true, _) => "pass",
                (false, Kind::Exact) => "FAIL",
                (false, Kind::Behaviour) => "not so",
            };
            let (name, claim) = (&check.name, &check.claim);
            writeln!(f, "{word:7} {name}: {claim}")?;
            writeln!(f, "        {:.4e} {}", check.measured, check.threshold)?;
            if !check.note.is_empty() {
                writeln!(f, "        {}", check.note)?;
            }
        }
        let of = |kind, passed| found.checks.iter().filter(|c| c.kind == kind && c.passed == passed).count();
        write!(
            f,
            "{}: {} of {} exact checks hold; {} of {} claims of behaviour were met here; {:.1} s",
            found.system,
            of(Kind::Exact, true),
            of(Kind::Exact, true) + of(Kind::Exact, false),
            of(Kind::Behaviour, true),
            of(Kind::Behaviour, true) + of(Kind::Behaviour, false),
            found.seconds
        )
    }
}

impl Reproduce {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let found = System::by_name(&self.name)?.reproduce(self.quick)?;
        std::fs::create_dir_all(&self.out).with_context(|| self.out.display().to_string())?;
        let path = self.out.join(format!("{}.json", found.system));
        let text = serde_json::to_string_pretty(&found)?;
        espalier_adapters::formats::atomic::write(&path, |file| std::io::Write::write_all(file, text.as_bytes()))?;
        let (passed, failed) =
            (found.passed, found.checks.iter().filter(|c| c.kind == Kind::Exact && !c.passed).count());
        out.result(&Found(found))?;
        out.message(format!("results in {}", path.display()));
        if !passed {
            bail!("{}: {failed} exact checks failed", self.name);
        }
        Ok(())
    }
}
