//! Axes: from data to a range with round tick marks, and numbers to short labels.
//!
//! Equation: step = the least of {1, 2, 5} x 10^k with 3/4 range / step <= wanted ticks; logarithmic axes mark decades, with
//!           2 and 5 between them when they are few, or round steps when the range is under a decade

/// How an axis maps values to positions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scale {
    /// Even distances for even differences.
    #[default]
    Linear,
    /// Even distances for even ratios; values that are not positive are not drawn (and are counted below the chart).
    Log,
}

/// A fitted axis.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    lo: f64,
    hi: f64,
    scale: Scale,
    /// Positions and labels of the marks, ascending.
    pub(super) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Fits the drawable ones of `values`. `round` widens the range to whole steps (for the y axis).
    pub(super) fn fit(values: impl Iterator<Item = f64>, scale: Scale, wanted: usize, round: bool) -> Self {
        let (mut lo, mut hi) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values.filter(|v| drawable(*v, scale)) {
            lo = lo.min(v);
            hi = hi.max(v);
        }
        if lo > hi {
            (lo, hi) = if scale == Scale::Log { (0.1, 1.0) } else { (0.0, 1.0) };
        }
        match scale {
            Scale::Linear => linear(lo, hi, wanted, round),
            Scale::Log => log(lo, hi, wanted, round),
        }
    }

    /// Position of `v` along the axis: 0 at its low end, 1 at its high end.
    pub(super) fn at(&self, v: f64) -> f64 {
        match self.scale {
            Scale::Linear => (v - self.lo) / (self.hi - self.lo),
            Scale::Log => (v.ln() - self.lo.ln()) / (self.hi.ln() - self.lo.ln()),
        }
    }

    /// The value at position `p`.
    pub(super) fn value(&self, p: f64) -> f64 {
        match self.scale {
            Scale::Linear => self.lo + p * (self.hi - self.lo),
            Scale::Log => (self.lo.ln() + p * (self.hi.ln() - self.lo.ln())).exp(),
        }
    }
}

/// Whether a value has a place on an axis. Beyond 1e300 differences overflow.
pub(super) fn drawable(v: f64, scale: Scale) -> bool {
    v.is_finite() && v.abs() < 1e300 && (scale == Scale::Linear || v > 1e-300)
}

fn nice_step(range: f64, wanted: usize) -> f64 {
    let rough = range / wanted.max(1) as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough * 0.75);
    step.unwrap_or(10.0 * power)
}

fn linear(mut lo: f64, mut hi: f64, wanted: usize, round: bool) -> Axis {
    // Differences that f64 can barely tell apart are drawn as one value.
    let least = lo.abs().max(hi.abs()) * 1e-9;
    if hi - lo <= least.max(1e-290) {
        let pad = if hi == 0.0 { 1.0 } else { hi.abs() * 0.1 };
        (lo, hi) = (lo - pad, hi + pad);
    }
    let step = nice_step(hi - lo, wanted);
    let first = if round { (lo / step + 1e-9).floor() } else { (lo / step - 1e-9).ceil() };
    let last = if round { (hi / step - 1e-9).ceil() } else { (hi / step + 1e-9).floor() };
    if round {
        (lo, hi) = (first * step, last * step);
    }
    let count = (last - first).clamp(0.0, 100.0) as usize;
    let ticks: Vec<f64> = (0..=count).map(|i| (first + i as f64) * step).collect();
    let label = labeller(&ticks, step);
    Axis { lo, hi, scale: Scale::Linear, ticks: ticks.into_iter().map(|v| (v, label(v))).collect() }
}

fn log(mut lo: f64, mut hi: f64, wanted: usize, round: bool) -> Axis {
    if hi <= lo * (1.0 + 1e-9) {
        (lo, hi) = (lo / 1.5, hi * 1.5);
    }
    let decades = (hi / lo).log10();
    if decades < 1.0 {
        let step = nice_step(hi - lo, wanted);
        if round {
            let floor = (lo / step + 1e-9).floor() * step;
            lo = if floor > 0.0 { floor } else { lo };
            hi = (hi / step - 1e-9).ceil() * step;
        }
        let first = (lo / step - 1e-9).ceil();
        let inside = |v: &f64| *v < hi * (1.0 + 1e-9);
        let ticks: Vec<f64> = (0..100).map(|i| (first + f64::from(i)) * step).take_while(inside).collect();
        let label = labeller(&ticks, step);
        return Axis { lo, hi, scale: Scale::Log, ticks: ticks.into_iter().map(|v| (v, label(v))).collect() };
    }
    let (first, last) = (lo.log10().floor() as i32, hi.log10().ceil() as i32);
    let factors: &[f64] = match decades {
        d if d < 2.0 => &[1.0, 2.0, 5.0],
        d if d < 3.0 => &[1.0, 3.0],
        _ => &[1.0],
    };
    let stride = ((last - first) as usize).div_ceil(wanted.max(1)).max(1);
    let stride = if factors.len() > 1 { 1 } else { stride };
    let marks: Vec<f64> = (first - 1..=last + 1)
        .filter(|k| k.rem_euclid(stride as i32) == 0)
        .flat_map(|k| factors.iter().map(move |f| f * 10_f64.powi(k)))
        .filter(|v| *v > 0.0 && v.is_finite())
        .collect();
    if round {
        lo = marks.iter().copied().rfind(|v| *v <= lo * (1.0 + 1e-9)).unwrap_or(lo);
        hi = marks.iter().copied().find(|v| *v >= hi * (1.0 - 1e-9)).unwrap_or(hi);
    }
    let inside = |v: &f64| *v >= lo * (1.0 - 1e-9) && *v <= hi * (1.0 + 1e-9);
    Axis {
        lo,
        hi,
        scale: Scale::Log,
        ticks: marks.into_iter().filter(inside).map(|v| (v, labeller(&[v], v)(v))).collect(),
    }
}

/// A label for marks `step` apart: one unit and one count of decimals for the whole axis.
fn labeller(ticks: &[f64], step: f64) -> impl Fn(f64) -> String + use<> {
    let top = ticks.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let (unit, suffix) = match top {
        t if t >= 1e15 || (t > 0.0 && t < 1e-3) => {
            let e = t.log10().floor() as i32;
            (10_f64.powi(e), format!("e{e}"))
        }
        t if t >= 1e12 => (1e12, "T".to_owned()),
        t if t >= 1e9 => (1e9, "G".to_owned()),
        t if t >= 1e6 => (1e6, "M".to_owned()),
        t if t >= 1e4 => (1e3, "k".to_owned()),
        _ => (1.0, String::new()),
    };
    let decimals = (-(step / unit).log10() - 1e-9).ceil().clamp(0.0, 12.0) as usize;
    move |v| {
        if v.abs() < step * 1e-6 { "0".to_owned() } else { format!("{:.decimals$}{suffix}", v / unit) }
    }
}

/// A number in at most four significant digits: `0.6931`, `12.5`, `1.2e-5`, `3.4e7`; whole numbers below 10^6 in full.
pub fn compact(v: f64) -> String {
    significant(v, 4)
}

/// Like [`compact`] in `digits` significant digits.
pub(super) fn significant(v: f64, digits: usize) -> String {
    if v.is_nan() {
        return "not a number".to_owned();
    }
    if v.is_infinite() {
        return if v > 0.0 { "infinite" } else { "-infinite" }.to_owned();
    }
    let size = v.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-4..1e6).contains(&size) {
        let text = format!("{v:.*e}", digits.saturating_sub(1));
        return match text.split_once('e') {
            Some((digits, power)) => format!("{}e{power}", trimmed(digits)),
            None => text,
        };
    }
    if v.fract() == 0.0 {
        return format!("{v:.0}");
    }
    let decimals = (digits as i32 - 1 - size.log10().floor() as i32).clamp(0, 8) as usize;
    trimmed(&format!("{v:.decimals$}")).to_owned()
}

fn trimmed(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn labels(values: &[f64], scale: Scale, round: bool) -> Vec<String> {
        Axis::fit(values.iter().copied(), scale, 5, round).ticks.into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn linear_marks_are_round() {
        assert_eq!(labels(&[0.13, 3.7], Scale::Linear, true), ["0", "1", "2", "3", "4"]);
        assert_eq!(labels(&[0.0, 1.0], Scale::Linear, true), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&[1.0, 100_000.0], Scale::Linear, false), ["20k", "40k", "60k", "80k", "100k"]);
        assert_eq!(labels(&[0.0, 2e-4], Scale::Linear, true), ["0", "0.5e-4", "1.0e-4", "1.5e-4", "2.0e-4"]);
    }

    #[test]
    fn log_marks_are_decades_or_finer() {
        assert_eq!(labels(&[1e-5, 1.0], Scale::Log, true), ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]);
        assert_eq!(labels(&[0.3, 9.0], Scale::Log, true), ["0.2", "0.5", "1", "2", "5", "10"]);
        assert_eq!(labels(&[2.0, 3.0], Scale::Log, true), ["2.0", "2.2", "2.4", "2.6", "2.8", "3.0"]);
    }

    #[test]
    fn any_values_give_a_finite_axis() {
        let odd = [
            0.0,
            -0.0,
            1e-300,
            1e299,
            -1e299,
            f64::MAX,
            f64::MIN_POSITIVE,
            f64::NAN,
            f64::INFINITY,
            5.0,
            5.000_000_001,
            -3.0,
        ];
        for a in odd {
            for b in odd {
                for scale in [Scale::Linear, Scale::Log] {
                    for round in [false, true] {
                        let axis = Axis::fit([a, b].into_iter(), scale, 5, round);
                        assert!(axis.lo < axis.hi && axis.ticks.len() < 102, "{a} {b} {scale:?} {axis:?}");
                        for v in [a, b].into_iter().filter(|v| drawable(*v, scale)) {
                            let p = axis.at(v);
                            assert!((-1e-6..=1.0 + 1e-6).contains(&p), "{v} of {a}, {b} at {p}: {axis:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn compact_numbers() {
        let cases = [
            (0.0, "0"),
            (0.31416, "0.3142"),
            (12.5, "12.5"),
            (123_456.0, "123456"),
            (1234.56, "1235"),
            (1.2e-5, "1.2e-5"),
            (3.4e7, "3.4e7"),
            (-2.0, "-2"),
        ];
        for (v, text) in cases {
            assert_eq!(compact(v), text);
        }
    }
}
