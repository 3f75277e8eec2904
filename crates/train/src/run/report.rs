//! `report.html`: one self-contained page about a run. No script, no external resource (a content policy in the page
//! forbids both); readable on light and dark screens and on paper.
//!
//! A [`Report`] is built from sections in reading order; every text passed in is escaped.

mod curves;
mod style;

use std::fmt::Write as _;
use std::path::Path;

use super::plot::{self, BarChart, Chart, HeatMap, escape};
use espalier_adapters::formats::atomic;

use super::RunError;

pub use curves::{curves, rolling_mean};

/// Builds the page. Consecutive charts share rows; everything else takes the full width.
#[derive(Debug, Clone)]
pub struct Report {
    title: String,
    subtitle: String,
    footer: String,
    sections: Vec<Section>,
}

#[derive(Debug, Clone)]
enum Section {
    Heading(String),
    Text(String),
    Notice(String),
    Code(String, String),
    Highlights(Vec<(String, String, String)>),
    Facts(Vec<(String, String)>),
    Figure { svg: String, wide: bool },
    Table { title: String, headers: Vec<String>, rows: Vec<Vec<String>> },
    Samples(String, Vec<Sample>),
}

/// One input with the model's outputs before and after training.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sample {
    /// The input.
    pub prompt: String,
    /// The wanted output, where the data have one.
    pub expected: Option<String>,
    /// The base model's output.
    pub before: String,
    /// The adapted model's output.
    pub after: String,
}

/// A chart that a report can show.
#[derive(Debug, Clone)]
pub struct Figure {
    svg: String,
    wide: bool,
}

impl Figure {
    /// Lets the figure take the full width of the page instead of half of it.
    #[must_use]
    pub fn wide(mut self) -> Self {
        self.wide = true;
        self
    }
}

impl From<&Chart> for Figure {
    fn from(chart: &Chart) -> Self {
        Self { svg: chart.svg(), wide: false }
    }
}

impl From<&BarChart> for Figure {
    fn from(chart: &BarChart) -> Self {
        Self { svg: chart.svg(), wide: false }
    }
}

impl From<&HeatMap> for Figure {
    fn from(map: &HeatMap) -> Self {
        Self { svg: map.svg(), wide: false }
    }
}

impl Report {
    /// An empty page.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), subtitle: String::new(), footer: String::new(), sections: Vec::new() }
    }

    /// A line below the title: model, method, date.
    #[must_use]
    pub fn subtitle(mut self, text: impl Into<String>) -> Self {
        self.subtitle = text.into();
        self
    }

    /// A line at the foot of the page, for example the version that wrote it.
    #[must_use]
    pub fn footer(mut self, text: impl Into<String>) -> Self {
        self.footer = text.into();
        self
    }

    /// A section heading.
    #[must_use]
    pub fn heading(self, text: impl Into<String>) -> Self {
        self.with(Section::Heading(text.into()))
    }

    /// Prose; blank lines separate paragraphs.
    #[must_use]
    pub fn text(self, text: impl Into<String>) -> Self {
        self.with(Section::Text(text.into()))
    }

    /// A marked remark: something the reader must not miss (stopped early, rows refused).
    #[must_use]
    pub fn notice(self, text: impl Into<String>) -> Self {
        self.with(Section::Notice(text.into()))
    }

    /// Preformatted text with a caption: a command, a recipe.
    #[must_use]
    pub fn code(self, caption: impl Into<String>, text: impl Into<String>) -> Self {
        self.with(Section::Code(caption.into(), text.into()))
    }

    /// The few figures that matter most, in large type: `(name, value, remark)`; the remark may be empty.
    #[must_use]
    pub fn highlights(
        self,
        items: impl IntoIterator<Item = (impl Into<String>, impl Into<String>, impl Into<String>)>,
    ) -> Self {
        self.with(Section::Highlights(items.into_iter().map(|(a, b, c)| (a.into(), b.into(), c.into())).collect()))
    }

    /// A summary table of `(name, value)` pairs.
    #[must_use]
    pub fn facts(self, items: impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>) -> Self {
        self.with(Section::Facts(items.into_iter().map(|(a, b)| (a.into(), b.into())).collect()))
    }

    /// A chart: `&Chart`, `&BarChart`, `&HeatMap` or a [`Figure`].
    #[must_use]
    pub fn chart(self, figure: impl Into<Figure>) -> Self {
        let Figure { svg, wide } = figure.into();
        self.with(Section::Figure { svg, wide })
    }

    /// Several charts in order, such as those of [`curves`].
    #[must_use]
    pub fn charts(self, figures: impl IntoIterator<Item = Figure>) -> Self {
        figures.into_iter().fold(self, |report, figure| report.chart(figure))
    }

    /// A table. Columns of numbers are set to the right; short rows are filled with empty cells.
    #[must_use]
    pub fn table(
        self,
        title: impl Into<String>,
        headers: impl IntoIterator<Item = impl Into<String>>,
        rows: impl IntoIterator<Item = Vec<String>>,
    ) -> Self {
        self.with(Section::Table {
            title: title.into(),
            headers: headers.into_iter().map(Into::into).collect(),
            rows: rows.into_iter().collect(),
        })
    }

    /// Outputs before and after training, side by side.
    #[must_use]
    pub fn samples(self, title: impl Into<String>, samples: impl IntoIterator<Item = Sample>) -> Self {
        self.with(Section::Samples(title.into(), samples.into_iter().collect()))
    }

    /// The page.
    pub fn html(&self) -> String {
        let title = escape(&self.title);
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>{}{}</style>\n</head>\n\
             <body>\n<main>\n<header><h1>{title}</h1>",
            style::PAGE,
            plot::STYLE
        );
        if !self.subtitle.is_empty() {
            let _ = write!(out, "<p>{}</p>", escape(&self.subtitle));
        }
        out.push_str("</header>\n");
        let mut in_figures = false;
        for section in &self.sections {
            let figure = matches!(section, Section::Figure { .. });
            if figure != in_figures {
                out.push_str(if figure { "<div class=\"figures\">\n" } else { "</div>\n" });
                in_figures = figure;
            }
            section.write(&mut out);
        }
        if in_figures {
            out.push_str("</div>\n");
        }
        if !self.footer.is_empty() {
            let _ = writeln!(out, "<footer>{}</footer>", escape(&self.footer));
        }
        out.push_str("</main>\n</body>\n</html>\n");
        out
    }

    /// Writes the page to `path` (usually `report.html` of the run folder), atomically.
    ///
    /// # Errors
    /// [`RunError::Replace`].
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), RunError> {
        Ok(atomic::write(path.as_ref(), |w| w.write_all(self.html().as_bytes()))?)
    }

    fn with(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }
}

impl Section {
    fn write(&self, out: &mut String) {
        match self {
            Self::Heading(text) => {
                let _ = writeln!(out, "<h2>{}</h2>", escape(text));
            }
            Self::Text(text) => {
                for paragraph in text.split("\n\n").filter(|p| !p.trim().is_empty()) {
                    let _ = writeln!(out, "<p>{}</p>", escape(paragraph.trim()));
                }
            }
            Self::Notice(text) => {
                let _ = writeln!(out, "<p class=\"notice\">{}</p>", escape(text));
            }
            Self::Code(caption, text) => {
                out.push_str("<figure class=\"code\">");
                if !caption.is_empty() {
                    let _ = write!(out, "<figcaption>{}</figcaption>", escape(caption));
                }
                let _ = writeln!(out, "<pre>{}</pre></figure>", escape(text.trim_end()));
            }
            Self::Highlights(items) => {
                out.push_str("<div class=\"highlights\">");
                for (name, value, remark) in items {
                    let [name, value, remark] = [name, value, remark].map(|t| escape(t));
                    let _ = write!(out, "<div><span>{name}</span><b>{value}</b><small>{remark}</small></div>");
                }
                out.push_str("</div>\n");
            }
            Self::Facts(items) => {
                out.push_str("<dl class=\"facts\">");
                for (name, value) in items {
                    let long = if value.chars().count() > 36 { " class=\"long\"" } else { "" };
                    let _ = write!(out, "<div{long}><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
                }
                out.push_str("</dl>\n");
            }
            Self::Figure { svg, wide } => {
                let class = if *wide { " class=\"wide\"" } else { "" };
                let _ = writeln!(out, "<figure{class}>{svg}</figure>");
            }
            Self::Table { title, headers, rows } => table(out, title, headers, rows),
            Self::Samples(title, samples) => {
                if !title.is_empty() {
                    let _ = writeln!(out, "<h3>{}</h3>", escape(title));
                }
                for sample in samples {
                    sample.write(out);
                }
            }
        }
    }
}

impl Sample {
    fn write(&self, out: &mut String) {
        let _ = write!(out, "<article class=\"sample\"><pre class=\"prompt\">{}</pre><div>", escape(&self.prompt));
        let mut part = |name: &str, text: &str, right: bool| {
            let mark = if right { " <i>as expected</i>" } else { "" };
            let body = if text.trim().is_empty() { "<em>(empty)</em>".to_owned() } else { escape(text) };
            let _ = write!(out, "<section><h4>{name}{mark}</h4><pre>{body}</pre></section>");
        };
        let right = |text: &str| self.expected.as_deref().is_some_and(|e| e.trim() == text.trim());
        part("Before", &self.before, right(&self.before));
        part("After", &self.after, right(&self.after));
        if let Some(expected) = &self.expected {
            part("Expected", expected, false);
        }
        out.push_str("</div></article>\n");
    }
}

fn table(out: &mut String, title: &str, headers: &[String], rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).fold(headers.len(), usize::max);
    let cell = |row: &'_ [String], c: usize| row.get(c).cloned().unwrap_or_default();
    let numeric: Vec<bool> = (0..columns)
        .map(|c| {
            let mut cells = rows.iter().filter_map(|r| r.get(c)).filter(|t| !t.is_empty()).peekable();
            cells.peek().is_some() && cells.all(|t| is_numeric(t))
        })
        .collect();
    let class = |c: usize| if numeric.get(c) == Some(&true) { " class=\"n\"" } else { "" };
    if !title.is_empty() {
        let _ = writeln!(out, "<h3>{}</h3>", escape(title));
    }
    out.push_str("<div class=\"table\"><table><thead><tr>");
    for c in 0..columns {
        let _ = write!(out, "<th{}>{}</th>", class(c), escape(&cell(headers, c)));
    }
    out.push_str("</tr></thead><tbody>\n");
    for row in rows {
        out.push_str("<tr>");
        for c in 0..columns {
            let _ = write!(out, "<td{}>{}</td>", class(c), escape(&cell(row, c)));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

/// A number, with or without sign, digit groups and unit: `-1.5`, `12 288`, `3.1 %`, `0.2 GiB`; or a dash for none.
fn is_numeric(text: &str) -> bool {
    let text = text.trim();
    let digits = text.trim_start_matches(['-', '+', '\u{2212}', '<', '>', '~']);
    matches!(text, "-" | "\u{2013}" | "\u{2014}")
        || digits.starts_with(|c: char| c.is_ascii_digit()) && text.chars().filter(|c| c.is_alphabetic()).count() <= 5
}
