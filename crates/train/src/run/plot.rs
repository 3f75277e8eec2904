//! Small SVG charts for run reports: lines, scatter, bars, heat maps. Pure functions of their data: the same data give
//! the same bytes. Colours are CSS classes over custom properties, so one chart serves light, dark and print; the
//! values under the pointer are `<title>` tooltips, so no script is needed.
//!
//! [`Chart::svg`], [`BarChart::svg`] and [`HeatMap::svg`] are for pages that carry [`STYLE`]; [`standalone`] makes an
//! SVG file of its own.

mod axis;
mod bars;
mod heatmap;
mod style;
mod xy;

pub use axis::{Scale, compact};
pub use bars::BarChart;
pub use heatmap::HeatMap;
pub use style::STYLE;
pub use xy::{Chart, Mark, Series};

/// Colours before they repeat (with a dashed line).
const COLOURS: usize = 8;

/// An SVG document from the result of one of the `svg` functions: with its own style and background.
pub fn standalone(svg: &str) -> String {
    match svg.split_once('>') {
        Some((open, rest)) => format!("{open}><style>{STYLE}svg.plot{{background:var(--plot-paper)}}</style>{rest}"),
        None => svg.to_owned(),
    }
}

/// Escapes text for XML and HTML content and quoted attributes; control characters that XML forbids become spaces.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Width of `text` in pixels at 11.5 px, near enough to lay out labels (wide scripts count double).
fn width(text: &str) -> f64 {
    text.chars().map(|c| if c as u32 >= 0x1100 { 12.0 } else { 6.4 }).sum()
}

/// `text` shortened to about `room` pixels.
fn clip(text: &str, room: f64) -> String {
    if width(text) <= room {
        return text.to_owned();
    }
    let mut out = String::new();
    let mut used = 7.0;
    for c in text.chars() {
        used += width(c.encode_utf8(&mut [0; 4]));
        if used > room {
            break;
        }
        out.push(c);
    }
    out.push('\u{2026}');
    out
}

/// Opening tag with an accessible name.
fn open(out: &mut String, w: f64, h: f64, label: &str) {
    out.push_str(&format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {w:.0} {h:.0}\" width=\"{w:.0}\" \
         height=\"{h:.0}\" role=\"img\" aria-label=\"{}\">",
        escape(label)
    ));
}

/// Title at the top left; returns the height it takes.
fn title(out: &mut String, text: &str, w: f64) -> f64 {
    if text.is_empty() {
        return 8.0;
    }
    out.push_str(&format!("<text class=\"t\" x=\"2\" y=\"17\">{}</text>", escape(&clip(text, w / 1.2))));
    30.0
}

/// Keys of several series in rows below the title; returns the y below them. `(name, colour, dashed, square)`.
fn legend(out: &mut String, keys: &[(&str, usize, &str, bool)], top: f64, w: f64) -> f64 {
    let (mut x, mut y) = (2.0, top);
    for (name, colour, class, square) in keys {
        let name = clip(name, w - 40.0);
        let need = if *square { 31.0 } else { 37.0 } + width(&name);
        if x > 2.0 && x + need > w {
            x = 2.0;
            y += 17.0;
        }
        if *square {
            out.push_str(&format!(
                "<rect class=\"f{colour}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"12\" height=\"10\" rx=\"2\"/>",
                y + 1.0
            ));
        } else {
            out.push_str(&format!(
                "<path class=\"s{colour} {class}\" d=\"M{x:.1} {0:.1}H{1:.1}\"/>",
                y + 6.0,
                x + 18.0
            ));
        }
        out.push_str(&format!(
            "<text class=\"l\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x + if *square { 17.0 } else { 23.0 },
            y + 10.0,
            escape(&name)
        ));
        x += need;
    }
    if keys.is_empty() { top } else { y + 22.0 }
}
