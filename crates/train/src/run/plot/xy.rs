//! Line and scatter charts of (x, y) series over shared axes.
//!
//! A line of any length is drawn from at most four points per pixel column (first, least, greatest, last), which gives
//! the same picture as all of them; equal dots of a scatter are drawn once.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::axis::{Axis, Scale, compact, drawable};
use super::{COLOURS, escape, legend, open, title};

/// How a series is drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mark {
    /// A line.
    #[default]
    Line,
    /// A thin pale line, for raw values behind a smoothed line.
    Faint,
    /// Dots only (scatter).
    Dots,
    /// A line with a dot at each point, for few points.
    LineDots,
}

/// A named series of points in drawing order. A point that is not finite interrupts the line.
#[derive(Debug, Clone, Default)]
pub struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    mark: Mark,
    colour: Option<usize>,
}

impl Series {
    /// A line through `points`.
    pub fn line(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points, ..Self::default() }
    }

    /// Draws the series as `mark`.
    #[must_use]
    pub fn mark(mut self, mark: Mark) -> Self {
        self.mark = mark;
        self
    }

    /// Uses colour number `colour` (modulo the palette) instead of the series' position.
    #[must_use]
    pub fn colour(mut self, colour: usize) -> Self {
        self.colour = Some(colour);
        self
    }
}

/// A chart of one or more [`Series`].
#[derive(Debug, Clone)]
pub struct Chart {
    title: String,
    x_label: String,
    y_label: String,
    x_scale: Scale,
    y_scale: Scale,
    series: Vec<Series>,
    size: (f64, f64),
    zero: bool,
}

impl Chart {
    /// An empty chart, 540 x 280 pixels, linear axes.
    pub fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            x_label: String::new(),
            y_label: String::new(),
            x_scale: Scale::Linear,
            y_scale: Scale::Linear,
            series: Vec::new(),
            size: (540.0, 280.0),
            zero: false,
        }
    }

    /// Names the axes; the unit belongs into the name.
    #[must_use]
    pub fn labels(mut self, x: impl Into<String>, y: impl Into<String>) -> Self {
        (self.x_label, self.y_label) = (x.into(), y.into());
        self
    }

    /// Sets the scales of the axes.
    #[must_use]
    pub fn scales(mut self, x: Scale, y: Scale) -> Self {
        (self.x_scale, self.y_scale) = (x, y);
        self
    }

    /// Lets a linear y axis include 0, for amounts (memory, tokens per second).
    #[must_use]
    pub fn from_zero(mut self) -> Self {
        self.zero = true;
        self
    }

    /// Size in pixels, at least 200 x 140; the SVG scales with its container.
    #[must_use]
    pub fn size(mut self, width: u32, height: u32) -> Self {
        self.size = (f64::from(width.max(200)), f64::from(height.max(140)));
        self
    }

    /// Adds a series.
    #[must_use]
    pub fn series(mut self, series: Series) -> Self {
        self.series.push(series);
        self
    }

    /// Adds a line through `points`.
    #[must_use]
    pub fn line(self, name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.series(Series::line(name, points))
    }

    /// Adds dots at `points`.
    #[must_use]
    pub fn scatter(self, name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.series(Series::line(name, points).mark(Mark::Dots))
    }

    /// The chart as an `<svg>` element for a page with [`super::STYLE`].
    pub fn svg(&self) -> String {
        let (w, h) = self.size;
        let mut out = String::new();
        open(&mut out, w, h, &self.title);
        let mut top = title(&mut out, &self.title, w);
        if self.series.len() > 1 {
            let keys = self.series.iter().enumerate().map(|(i, s)| {
                let colour = s.colour.unwrap_or(i);
                (s.name.as_str(), colour % COLOURS, class(s, colour), s.mark == Mark::Dots)
            });
            let keys: Vec<_> = keys.collect();
            top = legend(&mut out, &keys, top, w);
        }
        let drawn = |p: &(f64, f64)| drawable(p.0, self.x_scale) && drawable(p.1, self.y_scale);
        let points = || self.series.iter().flat_map(|s| &s.points);
        let left_out = points().filter(|p| !drawn(p)).count();
        if !points().any(drawn) {
            let _ = write!(
                out,
                "<text class=\"m c\" x=\"{:.1}\" y=\"{:.1}\">no values to draw</text></svg>",
                w / 2.0,
                (top + h) / 2.0
            );
            return out;
        }
        if !self.y_label.is_empty() {
            let _ = write!(out, "<text class=\"m\" x=\"2\" y=\"{:.1}\">{}</text>", top + 9.0, escape(&self.y_label));
            top += 17.0;
        }
        top += 7.0;
        let note = if left_out > 0 { 16.0 } else { 0.0 };
        let bottom = h - 24.0 - note - if self.x_label.is_empty() { 0.0 } else { 15.0 };
        let zero = (self.zero && self.y_scale == Scale::Linear).then_some(0.0);
        let ys = points().filter(|p| drawn(p)).map(|p| p.1).chain(zero);
        let y = Axis::fit(ys, self.y_scale, (((bottom - top) / 36.0) as usize).max(2), true);
        let left = y.ticks.iter().map(|t| super::width(&t.1)).fold(18.0, f64::max) + 10.0;
        let right = w - 14.0;
        let xs = points().filter(|p| drawn(p)).map(|p| p.0);
        let x = Axis::fit(xs, self.x_scale, (((right - left) / 62.0) as usize).max(2), false);
        let frame = Frame { x, y, left, right, top, bottom };
        frame.grid(&mut out);
        if !self.x_label.is_empty() {
            let _ = write!(
                out,
                "<text class=\"m c\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                (left + right) / 2.0,
                bottom + 32.0,
                escape(&self.x_label)
            );
        }
        if left_out > 0 {
            let why = if self.x_scale == Scale::Log || self.y_scale == Scale::Log {
                "not finite or not positive"
            } else {
                "not finite"
            };
            let _ = write!(
                out,
                "<text class=\"m\" x=\"{left:.1}\" y=\"{:.1}\">{left_out} of {} values not drawn: {why}</text>",
                h - 4.0,
                points().count()
            );
        }
        for (i, s) in self.series.iter().enumerate() {
            if s.mark != Mark::Dots {
                let colour = s.colour.unwrap_or(i);
                let d = frame.path(&s.points, drawn);
                let _ = write!(out, "<path class=\"s{} {}\" d=\"{d}\"/>", colour % COLOURS, class(s, colour));
            }
        }
        self.bands(&mut out, &frame, drawn);
        for (i, s) in self.series.iter().enumerate() {
            if matches!(s.mark, Mark::Dots | Mark::LineDots) {
                let colour = s.colour.unwrap_or(i) % COLOURS;
                let mut seen = BTreeSet::new();
                for p in s.points.iter().filter(|p| drawn(p)) {
                    let (px, py) = frame.place(*p);
                    if seen.insert(((px * 2.0) as i64, (py * 2.0) as i64)) {
                        let tip = format!("{}\n{}", self.at_x(p.0), value(&s.name, p.1));
                        let _ = write!(
                            out,
                            "<circle class=\"f{colour}\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\"><title>{}</title></circle>",
                            escape(&tip)
                        );
                    }
                }
            }
        }
        out.push_str("</svg>");
        out
    }

    fn at_x(&self, x: f64) -> String {
        let name = if self.x_label.is_empty() { "x" } else { &self.x_label };
        format!("{name} {}", compact(x))
    }

    /// Invisible strips that carry the values of all lines near their x as a tooltip.
    fn bands(&self, out: &mut String, frame: &Frame, drawn: impl Fn(&(f64, f64)) -> bool + Copy) {
        let sorted = |s: &&Series| s.mark != Mark::Dots && s.points.is_sorted_by(|a, b| a.0 <= b.0);
        let lines: Vec<(&str, Vec<(f64, f64)>)> = self
            .series
            .iter()
            .filter(sorted)
            .map(|s| (s.name.as_str(), s.points.iter().copied().filter(|p| drawn(p)).collect::<Vec<_>>()))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        let most = lines.iter().map(|l| l.1.len()).max().unwrap_or(0);
        let Some((_, main)) = lines.iter().find(|l| l.1.len() == most) else { return };
        let count = main.len().min(((frame.right - frame.left) / 6.0) as usize).max(1);
        let strip = (frame.right - frame.left) / count as f64;
        for i in 0..count {
            let Some(x) = nearest(main, frame.x.value((i as f64 + 0.5) / count as f64)).map(|p| p.0) else { continue };
            let mut tip = self.at_x(x);
            for (name, points) in &lines {
                if let Some(p) = nearest(points, x) {
                    let _ = write!(tip, "\n{}", value(name, p.1));
                    if p.0 != x {
                        let _ = write!(tip, " ({})", self.at_x(p.0));
                    }
                }
            }
            let _ = write!(
                out,
                "<rect class=\"hit\" x=\"{:.1}\" y=\"{:.1}\" width=\"{strip:.2}\" height=\"{:.1}\"><title>{}</title></rect>",
                frame.left + i as f64 * strip,
                frame.top,
                frame.bottom - frame.top,
                escape(&tip)
            );
        }
    }
}

fn value(name: &str, v: f64) -> String {
    if name.is_empty() { compact(v) } else { format!("{name}: {}", compact(v)) }
}

fn class(s: &Series, colour: usize) -> &'static str {
    match s.mark {
        Mark::Faint => "faint",
        // Long noisy lines would fill the area if drawn broad.
        Mark::Line if s.points.len() > 300 && colour < COLOURS => "fine",
        _ if colour >= COLOURS => "dash",
        _ => "",
    }
}

fn nearest(points: &[(f64, f64)], x: f64) -> Option<&(f64, f64)> {
    let after = points.partition_point(|p| p.0 < x);
    let around = [after.checked_sub(1), Some(after)].into_iter().flatten().filter_map(|i| points.get(i));
    around.min_by(|a, b| (a.0 - x).abs().total_cmp(&(b.0 - x).abs()))
}

/// The plot area.
struct Frame {
    x: Axis,
    y: Axis,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Frame {
    fn place(&self, p: (f64, f64)) -> (f64, f64) {
        (self.left + self.x.at(p.0) * (self.right - self.left), self.bottom - self.y.at(p.1) * (self.bottom - self.top))
    }

    fn grid(&self, out: &mut String) {
        for (v, label) in &self.y.ticks {
            let y = self.bottom - self.y.at(*v) * (self.bottom - self.top);
            let _ = write!(
                out,
                "<path class=\"g\" d=\"M{:.1} {y:.1}H{:.1}\"/><text class=\"m e\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
                self.left,
                self.right,
                self.left - 6.0,
                y + 4.0
            );
        }
        let _ = write!(out, "<path class=\"b\" d=\"M{:.1} {:.1}H{:.1}\"/>", self.left, self.bottom, self.right);
        for (v, label) in &self.x.ticks {
            let x = self.left + self.x.at(*v) * (self.right - self.left);
            let _ = write!(
                out,
                "<path class=\"b\" d=\"M{x:.1} {:.1}v4\"/><text class=\"m c\" x=\"{x:.1}\" y=\"{:.1}\">{label}</text>",
                self.bottom,
                self.bottom + 17.0
            );
        }
    }

    /// Path data of a line; points of one pixel column are reduced to first, least, greatest and last.
    fn path(&self, points: &[(f64, f64)], drawn: impl Fn(&(f64, f64)) -> bool) -> String {
        let mut d = String::new();
        for run in points.split(|p| !drawn(p)).filter(|run| !run.is_empty()) {
            let placed: Vec<(f64, f64)> = run.iter().map(|p| self.place(*p)).collect();
            let mut pen = 'M';
            for column in placed.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
                let extreme = |sign: f64| {
                    column.iter().enumerate().min_by(|a, b| (sign * a.1.1).total_cmp(&(sign * b.1.1))).map(|e| e.0)
                };
                let mut keep: Vec<usize> =
                    [Some(0), extreme(1.0), extreme(-1.0), Some(column.len() - 1)].into_iter().flatten().collect();
                keep.sort_unstable();
                keep.dedup();
                for (x, y) in keep.iter().filter_map(|i| column.get(*i)) {
                    let _ = write!(d, "{pen}{x:.1} {y:.1}");
                    pen = 'L';
                }
            }
            if placed.len() == 1 {
                d.push_str("h0.1");
            }
        }
        d
    }
}
