//! `espalier check`.

use std::fmt;

use anyhow::Result;
use clap::Args;
use espalier_train::Run;
use espalier_train::plan::Plan;
use serde::Serialize;

use crate::output::{Output, bytes, count};
use crate::recipe_flags::RecipeFlags;

/// Says what a recipe would do: sites, pattern counts, memory, rows, and the first rows token by token.
#[derive(Debug, Args)]
pub(crate) struct Check {
    #[command(flatten)]
    flags: RecipeFlags,
    /// Rows shown token by token.
    #[arg(long, default_value_t = 2)]
    rows: usize,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Report(Plan);

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = &self.0;
        writeln!(f, "{}", super::train::summary(plan))?;
        let storage: Vec<String> = plan.storage.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        writeln!(f, "\nFrozen matrices: {}", storage.join(", "))?;
        writeln!(f, "\nSites ({})", plan.sites.len())?;
        let width = plan.sites.iter().map(|s| s.path.len()).max().unwrap_or(0);
        for site in &plan.sites {
            let parameters = count(site.parameters);
            writeln!(
                f,
                "  {:width$}  rank {:>4}  alpha {:>6}  {parameters:>12} parameters",
                site.path, site.rank, site.alpha
            )?;
        }
        if !plan.dense.is_empty() {
            writeln!(f, "\nTrained whole: {}", plan.dense.join(", "))?;
        }
        let m = &plan.memory;
        writeln!(f, "\nMemory, estimated")?;
        for (name, n) in [
            ("frozen weights", m.weights),
            ("trained parameters, gradients, moments", m.trained),
            ("activations", m.activations),
            ("scores and scratch", m.transient),
            ("program", m.program),
            ("total", m.total),
        ] {
            writeln!(f, "  {name:40} {:>12}", bytes(n))?;
        }
        for row in &plan.rows {
            writeln!(f, "\n{} (trained tokens in [brackets])", row.place)?;
            let text: String =
                row.tokens
                    .iter()
                    .map(|t| {
                        if t.trained {
                            format!("[{}]", t.text.escape_debug())
                        } else {
                            t.text.escape_debug().to_string()
                        }
                    })
                    .collect::<Vec<_>>()
                    .join("|");
            writeln!(f, "  {text}")?;
        }
        Ok(())
    }
}

impl Check {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let mut run = Run::prepare(self.flags.recipe()?)?;
        out.result(&Report(run.plan(self.rows)?))
    }
}
