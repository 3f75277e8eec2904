//! The files of a run folder through their public interfaces: what is written can be read back, by us and by the tools
//! that the formats belong to; damage is reported with file and place; nothing passed in escapes into markup.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::Write as _;

use espalier_train::run::metrics::{self, EvalRecord, MetricsWriter, Record, Resumed, StepRecord};
use espalier_train::run::plot::{self, BarChart, Chart, HeatMap, Scale, Series};
use espalier_train::run::report::{Report, Sample, curves, rolling_mean};
use espalier_train::run::tensorboard::{self, EventWriter};
use espalier_train::run::{RunError, RunFolder};
use serde_json::{Value, json};

fn step(step: u64, loss: f64) -> Record {
    StepRecord {
        step,
        loss,
        lr: 2e-3,
        grad_norm: Some(0.5),
        tokens: 512,
        trained_tokens: 100,
        tokens_per_s: 1234.5,
        elapsed_s: step as f64,
        memory_bytes: Some(1 << 20),
        share_of_floor: None,
        extra: serde_json::Map::new(),
    }
    .into()
}

fn eval(step: u64, eval_loss: f64) -> Record {
    let extra = json!({"accuracy": 0.25}).as_object().unwrap().clone();
    EvalRecord { step, eval_loss, eval_tokens: 40, eval_s: 0.1, extra }.into()
}

#[test]
fn metrics_read_back_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::new(dir.path().join("run"));
    run.create().unwrap();
    let records = vec![eval(0, 3.0), step(1, 2.5), step(2, 2.25), eval(2, 2.75)];
    let mut writer = MetricsWriter::create(run.metrics()).unwrap();
    for (i, record) in records.iter().enumerate() {
        writer.append(record).unwrap();
        assert_eq!(metrics::read(run.metrics()).unwrap().len(), i + 1, "each line is there at once");
    }
    writer.sync().unwrap();
    assert_eq!(metrics::read(run.metrics()).unwrap(), records);
    let text = fs::read_to_string(run.metrics()).unwrap();
    let second: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
    assert_eq!((second["step"].as_u64(), second["loss"].as_f64()), (Some(1), Some(2.5)));
    assert!(second.get("share_of_floor").is_none());
}

#[test]
fn a_new_run_does_not_write_over_an_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    MetricsWriter::create(&path).unwrap().append(&step(1, 1.0)).unwrap();
    let error = MetricsWriter::create(&path).unwrap_err();
    assert!(matches!(error, RunError::Exists { .. }) && error.to_string().contains("metrics.jsonl"), "{error}");
    assert_eq!(metrics::read(&path).unwrap().len(), 1);
}

#[test]
fn resume_drops_later_records_and_a_torn_line_and_keeps_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut writer = MetricsWriter::create(&path).unwrap();
    for record in [step(1, 1.0), step(2, 0.1 + 0.2), eval(2, 0.5), step(3, 0.5)] {
        writer.append(&record).unwrap();
    }
    drop(writer);
    let before = fs::read(&path).unwrap();
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":4,\"loss\":0.").unwrap();
    assert_eq!(metrics::read(&path).unwrap().len(), 4, "a reader passes over the torn line");

    let (mut writer, resumed) = MetricsWriter::resume(&path, 2).unwrap();
    assert_eq!(resumed, Resumed { kept: 3, dropped: 1, torn: true });
    let after = fs::read(&path).unwrap();
    assert!(before.starts_with(&after) && after.ends_with(b"\n"));
    writer.append(&step(3, 0.75)).unwrap();
    let steps: Vec<u64> = metrics::read(&path).unwrap().iter().map(Record::step).collect();
    assert_eq!(steps, [1, 2, 2, 3]);
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["metrics.jsonl"], "no temporary file is left");
}

#[test]
fn resume_at_any_cut_gives_a_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut writer = MetricsWriter::create(&path).unwrap();
    for i in 1..=3 {
        writer.append(&step(i, 1.0 / i as f64)).unwrap();
    }
    let whole = fs::read(&path).unwrap();
    for cut in 0..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let (_, resumed) = MetricsWriter::resume(&path, 99).unwrap();
        let left = fs::read(&path).unwrap();
        assert!(whole.starts_with(&left) && (left.is_empty() || left.ends_with(b"\n")), "cut at {cut}");
        assert_eq!(metrics::read(&path).unwrap().len(), resumed.kept);
        // Whole lines survive, also one that lacks only its newline.
        assert_eq!(resumed.kept, whole[..cut].iter().filter(|b| **b == b'}').count(), "cut at {cut}");
    }
}

#[test]
fn a_missing_file_is_resumed_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let (mut writer, resumed) = MetricsWriter::resume(&path, 5).unwrap();
    assert_eq!(resumed, Resumed { kept: 0, dropped: 0, torn: false });
    writer.append(&step(6, 1.0)).unwrap();
    assert_eq!(metrics::read(&path).unwrap().len(), 1);
}

#[test]
fn damaged_lines_are_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let good = serde_json::to_string(&step(1, 1.0)).unwrap();
    for (bad, reason) in [
        ("{\"step\":", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("{\"step\":1}", "neither `loss` nor `eval_loss`"),
        ("{\"loss\":1,\"eval_loss\":1}", "both"),
        ("{\"step\":-1,\"eval_loss\":1}", "-1"),
    ] {
        let text = format!("{good}\n{bad}\n{good}\n");
        fs::write(&path, &text).unwrap();
        for error in [metrics::read(&path).unwrap_err(), MetricsWriter::resume(&path, 1).unwrap_err()] {
            let message = error.to_string();
            assert!(message.contains("metrics.jsonl:2:") && message.contains(reason), "{message}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    fs::write(&path, b"\xff\xfe\n").unwrap();
    assert!(matches!(metrics::read(&path), Err(RunError::Line { line: 1, .. })));
    assert!(matches!(metrics::read(dir.path().join("none")), Err(RunError::Io { .. })));
    assert!(matches!(MetricsWriter::create(dir.path().join("no/such/folder")), Err(RunError::Io { .. })));
}

#[test]
fn values_that_are_not_finite_survive_as_null() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut writer = MetricsWriter::create(&path).unwrap();
    writer.append(&step(1, f64::NAN)).unwrap();
    writer.append(&eval(1, f64::INFINITY)).unwrap();
    let read = metrics::read(&path).unwrap();
    assert!(matches!(&read[0], Record::Step(s) if s.loss.is_nan()));
    assert!(matches!(&read[1], Record::Eval(e) if e.eval_loss.is_nan()));
}

#[test]
fn an_extra_value_cannot_take_a_fields_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut writer = MetricsWriter::create(&path).unwrap();
    let extra = json!({"aux_loss": 0.1, "loss": 2.0}).as_object().unwrap().clone();
    let error = writer.append(&StepRecord { step: 7, extra, ..Default::default() }.into()).unwrap_err().to_string();
    assert!(error.contains("step 7") && error.contains("`loss`"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"");
}

#[test]
fn events_read_back_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::create(dir.path()).unwrap();
    for s in 1..=300_u64 {
        writer.scalars(s, [("train/loss", 1.0 / s as f64), ("train/lr", 2e-3), ("poids/\u{e9}", f64::NAN)]).unwrap();
    }
    let name = writer.path().file_name().unwrap().to_str().unwrap().to_owned();
    let parts: Vec<&str> = name.split('.').collect();
    assert_eq!(parts[..3], ["events", "out", "tfevents"]);
    assert!(parts[3].parse::<u64>().unwrap() > 1_600_000_000);
    assert_eq!(parts[5], std::process::id().to_string());

    let events = tensorboard::read(writer.path()).unwrap();
    assert_eq!(events.len(), 301);
    assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
    assert!(events[0].scalars.is_empty() && events[0].wall_time > 1.6e9);
    let last = &events[300];
    assert_eq!((last.step, last.scalars.len()), (300, 3));
    assert_eq!(last.scalars[0], ("train/loss".to_owned(), (1.0_f64 / 300.0) as f32));
    assert!(last.scalars[2].0 == "poids/\u{e9}" && last.scalars[2].1.is_nan());
}

#[test]
fn a_resumed_event_file_starts_a_session_after_the_step() {
    let dir = tempfile::tempdir().unwrap();
    let first = EventWriter::create(dir.path()).unwrap();
    let second = EventWriter::resume(dir.path(), 40).unwrap();
    assert_ne!(first.path(), second.path());
    let events = tensorboard::read(second.path()).unwrap();
    assert!(events[1].session_start);
    assert_eq!(events[1].step, 41);
    assert!(matches!(EventWriter::create(dir.path().join("none")), Err(RunError::Io { .. })));
}

#[test]
fn damaged_event_files_are_found_and_torn_ones_read_to_the_tear() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::create(dir.path()).unwrap();
    writer.scalars(1, [("loss", 1.0)]).unwrap();
    let bytes = fs::read(writer.path()).unwrap();
    let path = dir.path().join("copy");
    for cut in 0..bytes.len() {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert_eq!(tensorboard::read(&path).unwrap().len(), usize::from(cut >= 40), "cut at {cut}");
    }
    for at in 0..bytes.len() {
        let mut wrong = bytes.clone();
        wrong[at] ^= 0x10;
        fs::write(&path, &wrong).unwrap();
        let error = tensorboard::read(&path).unwrap_err();
        let record = usize::from(at >= 40);
        assert!(matches!(&error, RunError::Event { record: r, .. } if *r == record), "byte {at}: {error}");
    }
}

/// Tags of `markup` open and close in order, and attributes are quoted: enough to tell broken escaping.
fn assert_well_formed(markup: &str) {
    const VOID: &[&str] = &["meta", "!doctype"];
    let mut open: Vec<String> = Vec::new();
    let mut rest = markup;
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains('>'), "stray > in {:?}", &rest[..start]);
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        let name = tag.split([' ', '/']).find(|n| !n.is_empty()).unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "closing {tag}");
        } else if !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name.to_owned());
        }
        rest = &rest[end + 1..];
        if name == "style" && !tag.starts_with('/') {
            rest = &rest[rest.find("</style>").unwrap()..];
        }
    }
    assert_eq!(open, Vec::<String>::new());
}

const NASTY: &str = "</title><script>alert('x')</script> & \"q\" \u{1b}[0m \u{0}";

#[test]
fn charts_draw_any_data() {
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0, 1e-320, 1e308, -1e308, 3.5];
    let points: Vec<(f64, f64)> = odd.iter().flat_map(|a| odd.map(|b| (*a, b))).collect();
    let sets = [vec![], vec![(1.0, 1.0)], vec![(f64::NAN, 1.0)], vec![(2.0, 5.0); 3], points];
    for set in sets {
        for x in [Scale::Linear, Scale::Log] {
            for y in [Scale::Linear, Scale::Log] {
                let chart = Chart::new(NASTY)
                    .labels(NASTY, NASTY)
                    .scales(x, y)
                    .line(NASTY, set.clone())
                    .scatter("b", set.clone());
                let svg = chart.svg();
                assert_well_formed(&svg);
                assert!(!svg.contains("NaN") && !svg.contains("\"inf") && !svg.contains("<script"), "{svg}");
                assert_eq!(svg, chart.svg());
            }
        }
    }
    for values in [vec![], odd.to_vec()] {
        let bars = BarChart::new(NASTY, [NASTY, "b", "c"])
            .value_label("x")
            .series(NASTY, values.clone())
            .series("s", vec![1.0]);
        assert_well_formed(&bars.svg());
        let map = HeatMap::new(NASTY, ["a", NASTY], ["b", NASTY, "d"], vec![values]).value_label(NASTY).svg();
        assert_well_formed(&map);
        assert!(!map.contains("NaN"));
    }
    assert_well_formed(&BarChart::new("", Vec::<String>::new()).svg());
    assert_well_formed(&HeatMap::new("", Vec::<String>::new(), Vec::<String>::new(), vec![]).svg());
}

#[test]
fn what_is_left_out_of_a_chart_is_counted() {
    let svg =
        Chart::new("").scales(Scale::Linear, Scale::Log).line("", vec![(1.0, 1.0), (2.0, 0.0), (3.0, f64::NAN)]).svg();
    assert!(svg.contains("2 of 3 values not drawn"), "{svg}");
}

#[test]
fn long_curves_stay_small_and_keep_their_extremes() {
    let mut points: Vec<(f64, f64)> = (0..1_000_000).map(|i| (f64::from(i), (f64::from(i) * 0.7).sin())).collect();
    points[777_777].1 = 100.0;
    let svg = Chart::new("long").line("", points).svg();
    assert!(svg.len() < 120_000, "{} bytes", svg.len());
    // The spike is the axis' top: its y is the top of the plot area, where the uppermost grid line lies.
    let path = svg.split("<path class=\"s0 fine\" d=\"").nth(1).unwrap();
    let least =
        path.split('"').next().unwrap().split(['M', 'L']).filter_map(|p| p.split(' ').nth(1)?.parse::<f64>().ok());
    assert_eq!(least.fold(f64::MAX, f64::min), 37.0);
}

#[test]
fn standalone_charts_carry_their_style() {
    let svg = plot::standalone(&Chart::new("a > b").series(Series::line("s", vec![(0.0, 1.0), (1.0, 2.0)])).svg());
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && svg.contains("--plot-0"));
    assert_well_formed(&svg);
}

#[test]
fn rolling_mean_is_centred_and_passes_over_nan() {
    assert_eq!(rolling_mean(&[1.0, 2.0, 6.0, f64::NAN], 3), [1.5, 3.0, 4.0, 6.0]);
    assert_eq!(rolling_mean(&[1.0, 2.0], 1), [1.0, 2.0]);
    assert!(rolling_mean(&[f64::NAN], 9)[0].is_nan());
    assert!(rolling_mean(&[], 9).is_empty());
}

#[test]
fn curves_exist_for_what_was_recorded() {
    assert_eq!(curves(&[]).len(), 0);
    // Loss, learning rate, gradient norm, throughput, memory.
    assert_eq!(curves(&[step(1, 2.0), step(2, 1.0)]).len(), 5);
    // And evaluation loss and accuracy.
    assert_eq!(curves(&[eval(0, 3.0), step(1, 2.0), step(2, f64::NAN), eval(2, 1.0)]).len(), 7);
}

#[test]
fn the_report_is_self_contained_and_escaped() {
    let sample =
        Sample { prompt: NASTY.into(), expected: Some("4".into()), before: String::new(), after: "4\n".into() };
    let report = Report::new(NASTY)
        .subtitle(NASTY)
        .highlights([("Accuracy", "97 %", NASTY)])
        .facts([("Base", NASTY), ("Rank", "8")])
        .notice(NASTY)
        .heading(NASTY)
        .charts(curves(&[step(1, 2.0), step(2, 1.0)]))
        .chart(&BarChart::new("b", ["x"]).series("", vec![1.0]))
        .table(NASTY, ["site", NASTY], [vec![NASTY.into(), "12".into()], vec!["short".into()]])
        .samples("Samples", [sample])
        .text("one\n\ntwo")
        .code(NASTY, NASTY)
        .footer(NASTY);
    let html = report.html();
    assert_well_formed(&html);
    assert!(!html.contains("<script") && !html.contains("src=") && !html.contains("href=") && !html.contains("url("));
    assert!(html.contains("as expected") && html.contains("(empty)") && html.contains("<p>one</p>\n<p>two</p>"));
    assert!(html.contains("<td class=\"n\">12</td>"));

    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::new(dir.path());
    report.write(run.report()).unwrap();
    report.write(run.report()).unwrap();
    assert_eq!(fs::read_to_string(run.report()).unwrap(), html);
    let error = report.write(run.report().join("report.html")).unwrap_err();
    assert!(matches!(&error, RunError::Replace(_)) && error.to_string().contains("report.html"), "{error}");
    let full =
        espalier_adapters::formats::atomic::with_write_limit(100, || report.clone().text("more").write(run.report()));
    assert!(matches!(full, Err(RunError::Replace(_))));
    assert_eq!(fs::read_to_string(run.report()).unwrap(), html, "a full disk leaves the earlier page whole");
}
