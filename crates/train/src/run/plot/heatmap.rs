//! Heat maps: one cell per (row, column), for example layer by module. One hue from pale to full for values of one
//! sign; two hues around zero when both signs occur. Opacity carries the value, so the map works on light and dark paper.

use std::fmt::Write as _;

use super::axis::{compact, significant};
use super::{clip, escape, open, title, width};

/// A heat map of `rows` x `columns` values.
#[derive(Debug, Clone)]
pub struct HeatMap {
    title: String,
    value_label: String,
    rows: Vec<String>,
    columns: Vec<String>,
    values: Vec<Vec<f64>>,
    width: f64,
}

impl HeatMap {
    /// A map of `values[row][column]`, 540 pixels wide and as high as it needs. Missing and non-finite values are empty
    /// cells.
    pub fn new(
        title: impl Into<String>,
        rows: impl IntoIterator<Item = impl Into<String>>,
        columns: impl IntoIterator<Item = impl Into<String>>,
        values: Vec<Vec<f64>>,
    ) -> Self {
        Self {
            title: title.into(),
            value_label: String::new(),
            rows: rows.into_iter().map(Into::into).collect(),
            columns: columns.into_iter().map(Into::into).collect(),
            values,
            width: 540.0,
        }
    }

    /// Names the value, with its unit.
    #[must_use]
    pub fn value_label(mut self, label: impl Into<String>) -> Self {
        self.value_label = label.into();
        self
    }

    /// Width in pixels, at least 240.
    #[must_use]
    pub fn width(mut self, width: u32) -> Self {
        self.width = f64::from(width.max(240));
        self
    }

    fn value(&self, row: usize, column: usize) -> Option<f64> {
        self.values.get(row)?.get(column).copied().filter(|v| v.is_finite())
    }

    /// The map as an `<svg>` element for a page with [`super::STYLE`].
    pub fn svg(&self) -> String {
        let w = self.width;
        let (rows, columns) = (self.rows.len(), self.columns.len());
        let cells = || (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c)));
        let known = || cells().filter_map(|(r, c)| self.value(r, c));
        let (lo, hi) = known().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let signed = lo < 0.0 && hi > 0.0;
        let weight = |v: f64| {
            let share = match (signed, hi > lo) {
                (true, _) => v.abs() / hi.max(-lo),
                (false, true) => v / (hi - lo) - lo / (hi - lo),
                (false, false) => 1.0,
            };
            if signed { share } else { 0.08 + 0.92 * share }
        };
        let hue = |v: f64| if signed && v < 0.0 { "cold" } else { "hot" };

        let mut body = String::new();
        let mut top = title(&mut body, &self.title, w);
        if lo <= hi {
            top = self.key(&mut body, top, (lo, hi), signed);
        }
        let names = self.rows.iter().map(|r| width(r)).fold(10.0, f64::max).min(w * 0.35);
        let left = names + 10.0;
        let cell = ((w - left - 4.0) / columns.max(1) as f64).max(1.0);
        let high = cell.clamp(14.0, 26.0);
        let widest = self.columns.iter().map(|c| width(c)).fold(0.0, f64::max);
        let slanted = widest + 6.0 > cell && widest > 20.0;
        let need = if slanted { 14.0 } else { widest + 6.0 };
        let every = ((need / cell).ceil() as usize).max(1);
        top += if slanted { widest.min(110.0) * 0.7 + 12.0 } else { 14.0 };
        for (c, name) in self.columns.iter().enumerate().step_by(every) {
            let x = left + (c as f64 + 0.5) * cell;
            let y = top - 5.0;
            let text = escape(&clip(name, 110.0));
            let _ = if slanted {
                write!(body, "<text class=\"m\" transform=\"translate({x:.1} {y:.1}) rotate(-45)\">{text}</text>")
            } else {
                write!(body, "<text class=\"m c\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>")
            };
        }
        let labelled = known().all(|v| width(&significant(v, 2)) + 4.0 < cell);
        let gap = if cell > 6.0 { 1.0 } else { 0.0 };
        for (r, name) in self.rows.iter().enumerate() {
            let y = top + r as f64 * high;
            let _ = write!(
                body,
                "<text class=\"m e\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                left - 6.0,
                y + high / 2.0 + 4.0,
                escape(&clip(name, names))
            );
            for (c, column) in self.columns.iter().enumerate() {
                let x = left + c as f64 * cell;
                let value = self.value(r, c);
                let paint = match value {
                    Some(v) => format!("class=\"{}\" fill-opacity=\"{:.3}\"", hue(v), weight(v)),
                    None => "class=\"none\"".to_owned(),
                };
                let tip = value.map_or_else(|| "no value".to_owned(), compact);
                let _ = write!(
                    body,
                    "<rect {paint} x=\"{x:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{:.1}\"><title>{}</title></rect>",
                    cell - gap,
                    high - 1.0,
                    escape(&format!("{name}, {column}: {tip}"))
                );
                if let Some(v) = value.filter(|_| labelled) {
                    let shown = significant(v, 2);
                    let light = if weight(v) > 0.8 { " w" } else { "" };
                    let (x, y) = (x + cell / 2.0, y + high / 2.0 + 3.5);
                    let _ = write!(
                        body,
                        "<text class=\"c{light}\" x=\"{x:.1}\" y=\"{y:.1}\" pointer-events=\"none\">{shown}</text>"
                    );
                }
            }
        }
        let mut out = String::with_capacity(body.len() + 200);
        open(&mut out, w, top + rows as f64 * high + 6.0, &self.title);
        out.push_str(&body);
        out.push_str("</svg>");
        out
    }

    /// The colour key: steps from the least to the greatest value.
    fn key(&self, out: &mut String, top: f64, (lo, hi): (f64, f64), signed: bool) -> f64 {
        const STEPS: u32 = 12;
        let reach = hi.max(-lo);
        let (from, to) = if signed { (-reach, reach) } else { (lo, hi) };
        let first = format!("{} ", significant(from, 3));
        let mut x = 2.0 + width(&first);
        let _ = write!(out, "<text class=\"m\" x=\"2\" y=\"{:.1}\">{first}</text>", top + 10.0);
        for i in 0..STEPS {
            let p = f64::from(i) / f64::from(STEPS - 1);
            let (hue, weight) = match signed {
                true => (if p < 0.5 { "cold" } else { "hot" }, (2.0 * p - 1.0).abs()),
                false => ("hot", 0.08 + 0.92 * p),
            };
            let _ = write!(
                out,
                "<rect class=\"{hue}\" fill-opacity=\"{weight:.3}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\"/>",
                top + 1.0
            );
            x += 10.0;
        }
        let last = format!("{}  {}", significant(to, 3), self.value_label);
        let _ = write!(
            out,
            "<text class=\"m\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x + 6.0,
            top + 10.0,
            escape(last.trim_end())
        );
        top + 24.0
    }
}
