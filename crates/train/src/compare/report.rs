//! What a comparison found, as one page and as one table.

use std::path::Path;

use super::{Budget, Comparison, Ran, Standing};
use crate::run::plot::{Chart, Mark, Scale, Series};
use crate::run::report::{Figure, Report};
use crate::{Error, Result};

fn mib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".into(), |n| format!("{:.0}", n as f64 / 1_048_576.0))
}

fn row(s: &Standing) -> Vec<String> {
    let spread = s.spread.map_or_else(|| "-".into(), |spread| format!("{spread:.4}"));
    let lr = format!("{:e}{}", s.lr, if s.at_edge { " (edge)" } else { "" });
    vec![
        s.name.clone(),
        format!("{:.4}", s.loss),
        spread,
        format!("{} of {}", s.seeds.0, s.seeds.1),
        lr,
        s.parameters.to_string(),
        format!("{:.0}", s.adapter_bytes as f64 / 1024.0),
        mib(s.peak_bytes),
        format!("{:.0}", s.tokens_per_s),
    ]
}

const HEADERS: [&str; 9] = [
    "method",
    "held-out loss",
    "spread",
    "seeds",
    "learning rate",
    "parameters",
    "adapter KiB",
    "peak MiB",
    "tokens/s",
];

impl Comparison {
    fn budget(&self) -> String {
        match self.budget {
            Budget::Steps => "the steps of the recipe".into(),
            Budget::Tokens(n) => format!("{n} tokens"),
            Budget::Seconds(s) => format!("{s} s in steps"),
        }
    }

    /// What must be known to read the table.
    fn notes(&self) -> Vec<String> {
        let mut notes = vec![format!(
            "Every run has the budget of {}. The learning rate is chosen by the first seed among the same ones for every method.",
            self.budget()
        )];
        if self.standings.iter().any(|s| s.at_edge) {
            notes.push("(edge): the least or greatest of the sweep was best; a better one may lie outside.".into());
        }
        let failed = self.runs.iter().filter(|ran| ran.error.is_some()).count();
        if failed > 0 {
            notes.push(format!("{failed} of {} runs failed; they are listed with the reason.", self.runs.len()));
        }
        notes
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut out = line(&HEADERS.map(String::from));
        out += &format!("|---|{}\n", "---:|".repeat(HEADERS.len() - 1));
        self.standings.iter().for_each(|s| out += &line(&row(s)));
        self.notes().iter().for_each(|note| out += &format!("\n{note}\n"));
        out
    }

    /// The page with table and plots.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_report(&self, path: &Path, command: &str) -> Result<()> {
        let mut page =
            Report::new("Comparison").subtitle(format!("{} methods, {} runs", self.standings.len(), self.runs.len()));
        for note in self.notes() {
            page = page.text(note);
        }
        page = page.code("Command", command).table("Standings", HEADERS, self.standings.iter().map(row));
        page = page.heading("Plots").charts(self.plots()).heading("Every run").table(
            "Runs",
            ["method", "learning rate", "seed", "held-out loss", "steps", "seconds", "why it failed"],
            self.runs.iter().map(|ran| {
                let loss = ran.loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}"));
                let reason = ran.error.clone().unwrap_or_default();
                vec![
                    ran.name.clone(),
                    format!("{:e}", ran.lr),
                    ran.seed.to_string(),
                    loss,
                    ran.steps.to_string(),
                    format!("{:.1}", ran.seconds),
                    reason,
                ]
            }),
        );
        page.write(path).map_err(Error::from)
    }

    fn plots(&self) -> Vec<Figure> {
        let best = |s: &Standing| -> Option<&Ran> {
            self.runs.iter().find(|ran| ran.name == s.name && ran.lr == s.lr && ran.loss.is_some())
        };
        let curve = |title: &str, label: &str, of: &dyn Fn(&Ran) -> Vec<(f64, f64)>| {
            self.standings
                .iter()
                .filter_map(|s| Some((s, best(s)?)))
                .fold(Chart::new(title).labels(label, "held-out loss"), |chart, (s, ran)| {
                    chart.series(Series::line(s.name.clone(), of(ran)).mark(Mark::LineDots))
                })
        };
        let against = |title: &str, label: &str, scale: Scale, x: &dyn Fn(&Standing) -> f64| {
            self.standings
                .iter()
                .fold(Chart::new(title).labels(label, "held-out loss").scales(scale, Scale::Linear), |chart, s| {
                    chart.scatter(s.name.clone(), vec![(x(s), s.loss)])
                })
        };
        let seconds = |s: &Standing| best(s).map_or(f64::NAN, |ran| ran.seconds);
        let charts = [
            curve("Learning curves", "step", &|ran| {
                ran.curve.iter().map(|(step, _, loss)| (*step as f64, *loss)).collect()
            }),
            curve("Learning curves by time", "seconds", &|ran| {
                ran.curve.iter().map(|(_, s, loss)| (*s, *loss)).collect()
            }),
            against("Loss against parameters", "trainable parameters", Scale::Log, &|s| s.parameters as f64),
            against("Loss against time", "seconds", Scale::Linear, &seconds),
        ];
        charts.iter().map(Figure::from).collect()
    }
}
