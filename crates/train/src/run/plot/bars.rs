//! Horizontal bars by category, grouped where there are several series; each bar carries its value.

use std::fmt::Write as _;

use super::axis::{Axis, Scale, compact, drawable};
use super::{COLOURS, clip, escape, legend, open, title, width};

/// A bar chart: categories down the side, one bar per series in each.
#[derive(Debug, Clone)]
pub struct BarChart {
    title: String,
    value_label: String,
    categories: Vec<String>,
    series: Vec<(String, Vec<f64>)>,
    width: f64,
}

impl BarChart {
    /// A chart of the given categories, 540 pixels wide and as high as they need.
    pub fn new(title: impl Into<String>, categories: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            title: title.into(),
            value_label: String::new(),
            categories: categories.into_iter().map(Into::into).collect(),
            series: Vec::new(),
            width: 540.0,
        }
    }

    /// Names the value axis, with its unit.
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

    /// Adds a series: its values in the order of the categories; a missing or non-finite one has no bar.
    #[must_use]
    pub fn series(mut self, name: impl Into<String>, values: Vec<f64>) -> Self {
        self.series.push((name.into(), values));
        self
    }

    /// The chart as an `<svg>` element for a page with [`super::STYLE`].
    pub fn svg(&self) -> String {
        let w = self.width;
        let many = self.series.len().max(1) as f64;
        let bar = if self.series.len() > 1 { 13.0 } else { 18.0 };
        let group = many * (bar + 2.0) + 10.0;
        let mut body = String::new();
        let mut top = title(&mut body, &self.title, w);
        if self.series.len() > 1 {
            let keys: Vec<_> =
                self.series.iter().enumerate().map(|(i, s)| (s.0.as_str(), i % COLOURS, "", true)).collect();
            top = legend(&mut body, &keys, top, w);
        }
        let bottom = top + group * self.categories.len() as f64;
        let h = bottom + 22.0 + if self.value_label.is_empty() { 0.0 } else { 15.0 };
        let values = self.series.iter().flat_map(|s| s.1.iter().copied().take(self.categories.len()));
        let names = self.categories.iter().map(|c| width(c)).fold(20.0, f64::max).min(w * 0.4);
        let (left, right) = (names + 12.0, w - 52.0);
        let axis = Axis::fit(values.chain([0.0]), Scale::Linear, (((right - left) / 80.0) as usize).max(2), true);
        let at = |v: f64| left + axis.at(v) * (right - left);
        for (v, label) in &axis.ticks {
            let x = at(*v);
            let _ = write!(
                body,
                "<path class=\"g\" d=\"M{x:.1} {top:.1}V{bottom:.1}\"/>\
                 <text class=\"m c\" x=\"{x:.1}\" y=\"{:.1}\">{label}</text>",
                bottom + 16.0
            );
        }
        for (row, category) in self.categories.iter().enumerate() {
            let y0 = top + row as f64 * group + 5.0;
            let _ = write!(
                body,
                "<text class=\"e\" x=\"{:.1}\" y=\"{:.1}\">{}<title>{}</title></text>",
                left - 8.0,
                y0 + (group - 10.0) / 2.0 + 4.0,
                escape(&clip(category, names)),
                escape(category)
            );
            for (i, (name, values)) in self.series.iter().enumerate() {
                let Some(v) = values.get(row).copied().filter(|v| drawable(*v, Scale::Linear)) else { continue };
                let y = y0 + i as f64 * (bar + 2.0);
                let (zero, end) = (at(0.0), at(v));
                let tip = format!("{category}\n{name}: {}", compact(v));
                let _ = write!(
                    body,
                    "<rect class=\"f{}\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{bar}\" rx=\"2\">\
                     <title>{}</title></rect><text class=\"m{}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                    i % COLOURS,
                    zero.min(end),
                    (end - zero).abs().max(0.5),
                    escape(&tip),
                    if v < 0.0 { " e" } else { "" },
                    if v < 0.0 { end - 5.0 } else { end + 5.0 },
                    y + bar / 2.0 + 4.0,
                    compact(v)
                );
            }
        }
        let zero = at(0.0);
        let _ = write!(body, "<path class=\"b\" d=\"M{zero:.1} {top:.1}V{bottom:.1}\"/>");
        if !self.value_label.is_empty() {
            let _ = write!(
                body,
                "<text class=\"m c\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                (left + right) / 2.0,
                bottom + 31.0,
                escape(&self.value_label)
            );
        }
        let mut out = String::with_capacity(body.len() + 200);
        open(&mut out, w, h, &self.title);
        out.push_str(&body);
        out.push_str("</svg>");
        out
    }
}
