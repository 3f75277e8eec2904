//! The curves of a run from its metrics: loss (raw and smoothed) with evaluations, learning rate, gradient norm,
//! throughput, memory, and every further number that the records carry.

use serde_json::{Map, Value};

use super::Figure;
use crate::run::metrics::{EvalRecord, Record, StepRecord};
use crate::run::plot::{Chart, Mark, Series};

type Points = Vec<(f64, f64)>;

/// Charts of `records` in reading order, the loss first and at full width; a quantity that no record has gets none.
pub fn curves(records: &[Record]) -> Vec<Figure> {
    let steps: Vec<&StepRecord> =
        records.iter().filter_map(|r| if let Record::Step(s) = r { Some(s) } else { None }).collect();
    let evals: Vec<&EvalRecord> =
        records.iter().filter_map(|r| if let Record::Eval(e) = r { Some(e) } else { None }).collect();
    let of = |get: &dyn Fn(&StepRecord) -> Option<f64>| -> Points {
        steps.iter().filter_map(|s| Some((s.step as f64, get(s)?))).collect()
    };
    let loss = of(&|s| Some(s.loss));
    let eval: Points = evals.iter().map(|e| (e.step as f64, e.eval_loss)).collect();

    let mut figures = Vec::new();
    if !loss.is_empty() {
        figures.push(Figure::from(&loss_chart(loss, &eval)).wide());
    }
    if eval.len() > 1 {
        let chart =
            half("Evaluation loss", "nats per token").series(Series::line("", eval).mark(Mark::LineDots).colour(1));
        figures.push(Figure::from(&chart));
    }
    for key in numbers(evals.iter().map(|e| &e.extra)) {
        let points: Points = evals.iter().filter_map(|e| Some((e.step as f64, e.extra.get(&key)?.as_f64()?))).collect();
        let chart =
            half(&format!("Evaluation: {key}"), "").series(Series::line("", points).mark(Mark::LineDots).colour(1));
        figures.push(Figure::from(&chart));
    }
    let lr = half("Learning rate", "").line("", of(&|s| Some(s.lr))).from_zero();
    let norm = half("Gradient norm", "before clipping").line("", of(&|s| s.grad_norm)).from_zero();
    let speed = half("Throughput", "tokens per second").line("", of(&|s| Some(s.tokens_per_s))).from_zero();
    let memory = of(&|s| s.memory_bytes.map(|b| b as f64 / f64::from(1 << 30)));
    let memory = half("Memory", "GiB").line("", memory).from_zero();
    let floor =
        half("Share of the speed limit", "least time / time taken").line("", of(&|s| s.share_of_floor)).from_zero();
    let has = |get: &dyn Fn(&StepRecord) -> bool| steps.iter().any(|s| get(s));
    let each: [(bool, Chart); 5] = [
        (!steps.is_empty(), lr),
        (has(&|s| s.grad_norm.is_some()), norm),
        (!steps.is_empty(), speed),
        (has(&|s| s.memory_bytes.is_some()), memory),
        (has(&|s| s.share_of_floor.is_some()), floor),
    ];
    figures.extend(each.into_iter().filter(|(there, _)| *there).map(|(_, chart)| Figure::from(&chart)));
    for key in numbers(steps.iter().map(|s| &s.extra)) {
        let points = of(&|s| s.extra.get(&key).and_then(Value::as_f64));
        figures.push(Figure::from(&half(&key, "").line("", points)));
    }
    figures
}

fn half(title: &str, unit: &str) -> Chart {
    Chart::new(title).labels("step", unit).size(522, 250)
}

fn loss_chart(loss: Points, eval: &Points) -> Chart {
    let span = (loss.len() / 25).clamp(1, 501) | 1;
    let chart = Chart::new("Training loss").labels("step", "nats per token").size(1074, 360);
    let mut chart = if span >= 3 {
        let values: Vec<f64> = loss.iter().map(|p| p.1).collect();
        let smooth = loss.iter().map(|p| p.0).zip(rolling_mean(&values, span)).collect();
        chart
            .series(Series::line("each step", loss).mark(Mark::Faint).colour(0))
            .series(Series::line(format!("mean over {span} steps"), smooth).colour(0))
    } else {
        let mark = if loss.len() > 40 { Mark::Line } else { Mark::LineDots };
        chart.series(Series::line("each step", loss).mark(mark).colour(0))
    };
    if !eval.is_empty() {
        chart = chart.series(Series::line("evaluation", eval.clone()).mark(Mark::LineDots).colour(1));
    }
    chart
}

/// Centred mean over `span` neighbours (made odd), fewer at the ends; values that are not finite are passed over, and
/// a window without any finite value gives NaN.
pub fn rolling_mean(values: &[f64], span: usize) -> Vec<f64> {
    let reach = span / 2;
    let mut sums = Vec::with_capacity(values.len() + 1);
    let (mut sum, mut count) = (0.0, 0_usize);
    sums.push((sum, count));
    for v in values {
        if v.is_finite() {
            sum += v;
            count += 1;
        }
        sums.push((sum, count));
    }
    let at = |i: usize| sums.get(i).copied().unwrap_or((sum, count));
    (0..values.len())
        .map(|i| {
            let (a, b) = (at(i.saturating_sub(reach)), at((i + reach + 1).min(values.len())));
            if b.1 > a.1 { (b.0 - a.0) / (b.1 - a.1) as f64 } else { f64::NAN }
        })
        .collect()
}

/// Names of numeric extra values, in order of first appearance.
fn numbers<'a>(maps: impl Iterator<Item = &'a Map<String, Value>>) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    for (key, value) in maps.flatten() {
        if value.is_number() && !keys.contains(key) {
            keys.push(key.clone());
        }
    }
    keys
}
