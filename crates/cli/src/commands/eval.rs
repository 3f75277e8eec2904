//! `espalier eval`.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use espalier_data::{DataOptions, EncodeOptions, Example, Row, Source};
use espalier_infer::eval::{self, ChoiceColumns, ChoiceRow, EvalOptions};
use espalier_infer::{GenerateOptions, end_ids, longest};
use serde::Serialize;
use serde_json::{Value, json};

use super::model_args::{Loaded, ModelArgs};
use crate::output::Output;
use crate::progress;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Metric {
    /// Loss of the labelled tokens; classification for classifiers.
    Auto,
    /// Loss and perplexity of the labelled tokens.
    Perplexity,
    /// Share of rows whose greedy answer is the expected one.
    ExactMatch,
    /// Share of questions whose likeliest choice is right.
    Choice,
    /// Accuracy, F1 and MCC of a classifier.
    Classification,
}

/// Scores a model on data, with or without adapters.
#[derive(Debug, Args)]
pub(crate) struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    /// Data file or folder; may be given several times.
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// What is measured.
    #[arg(long, value_enum, default_value = "auto")]
    metric: Metric,
    /// Rows used; 0: all.
    #[arg(long, default_value_t = 0)]
    limit_rows: usize,
    /// Rows that run together.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Most new tokens of an answer (exact match).
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Text that ends an answer (exact match); may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Count the loss of whole rows, not of completions alone.
    #[arg(long)]
    whole_rows: bool,
    /// Write the answers of every row here (JSONL).
    #[arg(long)]
    answers: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Scores {
    metric: &'static str,
    #[serde(flatten)]
    values: Value,
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.metric)?;
        for (key, value) in self.values.as_object().into_iter().flatten() {
            match value {
                Value::Number(n) if n.is_f64() => writeln!(f, "  {key:22} {:.4}", n.as_f64().unwrap_or_default())?,
                Value::Array(_) => {}
                Value::Object(map) if map.is_empty() => {}
                other => writeln!(f, "  {key:22} {other}")?,
            }
        }
        Ok(())
    }
}

impl Eval {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let loaded = self.model.load(out)?;
        let classifier = loaded.model.config().labels().is_some();
        let metric = match (self.metric, classifier) {
            (Metric::Auto, true) => Metric::Classification,
            (Metric::Auto, false) => Metric::Perplexity,
            (given, _) => given,
        };
        let bar = progress::bar(out, 0, "rows");
        let mut seen = |done: usize, total: usize| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        };
        let separator = eval::pair_separator(&loaded.model, &loaded.codec);
        let options = EvalOptions { batch_size: self.batch_size, separator };
        let (name, mut values) = match metric {
            Metric::Perplexity | Metric::Auto => {
                let examples = self.examples(&loaded)?;
                ("perplexity", serde_json::to_value(eval::perplexity(&loaded.model, &examples, &options, &mut seen)?)?)
            }
            Metric::Classification => {
                let examples = self.examples(&loaded)?;
                let score = eval::classification(&loaded.model, &examples, &options, &mut seen)?;
                ("classification", serde_json::to_value(score)?)
            }
            Metric::ExactMatch => {
                let rows = self.rows()?;
                let generation = GenerateOptions {
                    max_new_tokens: self.max_new_tokens,
                    stop: self.stop.clone(),
                    eos: end_ids(&loaded.model, &loaded.codec),
                    batch_size: self.batch_size,
                    ..GenerateOptions::default()
                };
                let score = eval::exact_match(&loaded.model, &loaded.codec, &rows, &generation, &mut seen)?;
                ("exact_match", serde_json::to_value(score)?)
            }
            Metric::Choice => {
                let questions = self.questions()?;
                let score = eval::choice_accuracy(&loaded.model, &loaded.codec, &questions, &options, &mut seen)?;
                ("choice", serde_json::to_value(score)?)
            }
        };
        bar.finish_and_clear();
        if let Some(map) = values.as_object_mut() {
            let answers = map.remove("pairs").or_else(|| map.remove("answers")).or_else(|| map.remove("predictions"));
            if let (Some(path), Some(Value::Array(answers))) = (&self.answers, answers) {
                let text: String = answers.iter().map(|a| format!("{a}\n")).collect();
                espalier_adapters::formats::atomic::write(path, |out| out.write_all(text.as_bytes()))?;
            }
            map.insert("data".into(), json!(self.data));
        }
        out.result(&Scores { metric: name, values })
    }

    fn source(&self) -> Result<Source> {
        let limit = (self.limit_rows > 0).then_some(self.limit_rows);
        Ok(Source::open_many(&self.data, DataOptions { limit, ..DataOptions::default() })?)
    }

    fn rows(&self) -> Result<Vec<Row>> {
        let rows = self.source()?.rows().map(|row| Ok(row?.1)).collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            bail!("the data hold no row");
        }
        Ok(rows)
    }

    fn examples(&self, loaded: &Loaded) -> Result<Vec<Example>> {
        let options = EncodeOptions {
            max_length: Some(longest(&loaded.model)),
            completion_only: !self.whole_rows,
            label_names: loaded.model.config().label_names(),
            ..EncodeOptions::default()
        };
        let codec = loaded.codec.clone().with_options(options);
        self.rows()?
            .iter()
            .enumerate()
            .map(|(i, row)| codec.encode(row).with_context(|| format!("row {}", i + 1)))
            .collect()
    }

    fn questions(&self) -> Result<Vec<ChoiceRow>> {
        let columns = ChoiceColumns::default();
        self.source()?
            .records()
            .map(|record| {
                let (place, value) = record?;
                ChoiceRow::from_value(&value, &columns).map_err(|e| anyhow::anyhow!("{place}: {e}"))
            })
            .take(if self.limit_rows > 0 { self.limit_rows } else { usize::MAX })
            .collect()
    }
}
