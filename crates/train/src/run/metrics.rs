//! `metrics.jsonl`: one JSON object per optimiser step and one per evaluation, appended as whole lines.
//!
//! A step record has `loss` (the loss before the step's update); an evaluation record has `eval_loss` instead. A value
//! that is not finite is written as `null` and read back as NaN. Lines are handed to the operating system one by one,
//! so a killed process loses at most the line it was writing; [`MetricsWriter::resume`] removes such a torn tail and
//! every record after the checkpoint, and keeps the other lines byte for byte.

use std::fs::OpenOptions;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use espalier_adapters::formats::atomic;
use espalier_adapters::formats::faults::Limited;

use super::RunError;

/// What one optimiser step did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimiser step, from 1.
    pub step: u64,
    /// Mean loss over the step's trained tokens, before the update (nats per token).
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Learning rate of the main parameter group in this step.
    #[serde(deserialize_with = "nan_if_null")]
    pub lr: f64,
    /// Global gradient norm before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Tokens processed in this step, without padding.
    pub tokens: u64,
    /// Those of them that carried a label.
    pub trained_tokens: u64,
    /// Processed tokens per second of this step.
    #[serde(deserialize_with = "nan_if_null")]
    pub tokens_per_s: f64,
    /// Training time since the run began, resumed parts included (seconds).
    #[serde(deserialize_with = "nan_if_null")]
    pub elapsed_s: f64,
    /// Memory in use on the device, or resident on the host (bytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// The least time the arithmetic could take on this machine over the time the step took (0 to 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_of_floor: Option<f64>,
    /// Further values of the objective or the router, by name; keys must differ from the fields above.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// What one evaluation during training found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimiser steps done when the evaluation ran; 0 is before training.
    pub step: u64,
    /// Mean loss over the labelled tokens of the evaluation rows (nats per token).
    #[serde(deserialize_with = "nan_if_null")]
    pub eval_loss: f64,
    /// Labelled tokens evaluated.
    #[serde(default)]
    pub eval_tokens: u64,
    /// Time the evaluation took (seconds).
    #[serde(default, deserialize_with = "nan_if_null")]
    pub eval_s: f64,
    /// Further scores (accuracy, F1, ...) by name; keys must differ from the fields above and from `loss`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Record {
    /// An optimiser step: the object has `loss`.
    Step(StepRecord),
    /// An evaluation: the object has `eval_loss`.
    Eval(EvalRecord),
}

impl Record {
    /// The optimiser step the record belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(r) => r.step,
            Self::Eval(r) => r.step,
        }
    }

    fn parse(line: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(line).map_err(|e| format!("not a JSON object: {e}"))?;
        let Value::Object(map) = &value else { return Err("not a JSON object".to_owned()) };
        match (map.contains_key("loss"), map.contains_key("eval_loss")) {
            (true, false) => serde_json::from_value(value).map(Self::Step).map_err(|e| e.to_string()),
            (false, true) => serde_json::from_value(value).map(Self::Eval).map_err(|e| e.to_string()),
            (true, true) => Err("has both `loss` and `eval_loss`".to_owned()),
            (false, false) => Err("has neither `loss` nor `eval_loss`".to_owned()),
        }
    }

    /// A key of `extra` that a field of the record already uses.
    fn taken_key(&self) -> Option<&str> {
        const STEP: &[&str] = &[
            "step",
            "loss",
            "lr",
            "grad_norm",
            "tokens",
            "trained_tokens",
            "tokens_per_s",
            "elapsed_s",
            "memory_bytes",
            "share_of_floor",
            "eval_loss",
        ];
        const EVAL: &[&str] = &["step", "eval_loss", "eval_tokens", "eval_s", "loss"];
        let (extra, taken) = match self {
            Self::Step(r) => (&r.extra, STEP),
            Self::Eval(r) => (&r.extra, EVAL),
        };
        extra.keys().map(String::as_str).find(|k| taken.contains(k))
    }
}

impl From<StepRecord> for Record {
    fn from(r: StepRecord) -> Self {
        Self::Step(r)
    }
}

impl From<EvalRecord> for Record {
    fn from(r: EvalRecord) -> Self {
        Self::Eval(r)
    }
}

/// What [`MetricsWriter::resume`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resumed {
    /// Records kept (step at most N).
    pub kept: usize,
    /// Complete records dropped (step after N).
    pub dropped: usize,
    /// Whether the file ended in a torn line, also dropped.
    pub torn: bool,
}

/// Appends records to `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    file: Limited,
    path: PathBuf,
    /// Bytes of whole lines; anything behind is the rest of a failed write.
    len: u64,
}

impl MetricsWriter {
    /// Starts the file of a new run; an existing empty file is taken over.
    ///
    /// # Errors
    /// [`RunError::Exists`] if the file already holds anything; [`RunError::Io`] if it cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, RunError> {
        let path = path.as_ref();
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| RunError::io("create", path, e))?;
        let len = file.metadata().map_err(|e| RunError::io("read", path, e))?.len();
        if len > 0 {
            return Err(RunError::Exists { path: path.to_path_buf() });
        }
        Ok(Self { file: Limited::new(file), path: path.to_path_buf(), len: 0 })
    }

    /// Continues after optimiser step `step`: keeps the records up to and including it, drops later ones and a torn
    /// last line (one atomic rewrite, only if there is anything to drop). A missing file is started empty.
    ///
    /// # Errors
    /// [`RunError::Line`] if a complete line is no record (the file is left as it was); [`RunError::Io`] and [`RunError::Replace`].
    pub fn resume(path: impl AsRef<Path>, step: u64) -> Result<(Self, Resumed), RunError> {
        let path = path.as_ref();
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(RunError::io("read", path, e)),
        };
        let (lines, torn) = parse(path, &bytes)?;
        let total = lines.len();
        let mut whole = Vec::with_capacity(bytes.len());
        let mut kept = 0;
        for (line, record) in lines {
            if record.step() <= step {
                kept += 1;
                whole.extend_from_slice(line);
                whole.push(b'\n');
            }
        }
        if whole != bytes || bytes.is_empty() {
            atomic::write(path, |w| w.write_all(&whole))?;
        }
        let file = OpenOptions::new().write(true).open(path).map_err(|e| RunError::io("open", path, e))?;
        let writer = Self { file: Limited::new(file), path: path.to_path_buf(), len: whole.len() as u64 };
        Ok((writer, Resumed { kept, dropped: total - kept, torn }))
    }

    /// Appends one record as one line and hands it to the operating system. After an error the file holds the earlier
    /// lines and the call can be repeated.
    ///
    /// # Errors
    /// [`RunError::Record`] if a key of `extra` repeats a field; [`RunError::Io`], for example on a full disk.
    pub fn append(&mut self, record: &Record) -> Result<(), RunError> {
        let bad = |reason| RunError::Record { path: self.path.clone(), step: record.step(), reason };
        if let Some(key) = record.taken_key() {
            return Err(bad(format!("extra value `{key}` has the name of a built-in one: rename it")));
        }
        let mut line = serde_json::to_vec(record).map_err(|e| bad(e.to_string()))?;
        line.push(b'\n');
        match self.put(&line) {
            Ok(()) => {
                self.len += line.len() as u64;
                Ok(())
            }
            Err(e) => {
                // If cutting the torn part off fails as well, the next append or the next reader does it.
                let _ = self.file.get().set_len(self.len);
                Err(RunError::io("append to", &self.path, e))
            }
        }
    }

    /// Forces the written lines to the disk; call it before a checkpoint that refers to them.
    ///
    /// # Errors
    /// [`RunError::Io`].
    pub fn sync(&self) -> Result<(), RunError> {
        self.file.get().sync_data().map_err(|e| RunError::io("sync", &self.path, e))
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn put(&mut self, line: &[u8]) -> io::Result<()> {
        let file = self.file.get_mut();
        if file.seek(SeekFrom::End(0))? != self.len {
            file.set_len(self.len)?;
            file.seek(SeekFrom::Start(self.len))?;
        }
        self.file.write_all(line)?;
        self.file.flush()
    }
}

/// Reads all records in file order; a torn last line (a run still writing, or killed) is left out.
///
/// # Errors
/// [`RunError::Io`] if the file cannot be read; [`RunError::Line`] if a complete line is no record.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Record>, RunError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|e| RunError::io("read", path, e))?;
    Ok(parse(path, &bytes)?.0.into_iter().map(|(_, record)| record).collect())
}

type Lines<'a> = Vec<(&'a [u8], Record)>;

/// The complete lines with their records, and whether a torn tail was left out. A last line without its newline counts
/// as complete when it parses: an object cannot be cut and still close. Blank lines are skipped.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Lines<'a>, bool), RunError> {
    let mut lines = Vec::new();
    let closed = bytes.is_empty() || bytes.ends_with(b"\n");
    let count = bytes.split(|b| *b == b'\n').count();
    for (i, line) in bytes.split(|b| *b == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match Record::parse(line) {
            Ok(record) => lines.push((line, record)),
            Err(_) if !closed && i + 1 == count => return Ok((lines, true)),
            Err(reason) => return Err(RunError::Line { path: path.to_path_buf(), line: i + 1, reason }),
        }
    }
    Ok((lines, false))
}

fn nan_if_null<'de, D: serde::Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn full_disk_is_an_error_that_names_the_file() {
        let path = PathBuf::from("/dev/full");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let mut writer = MetricsWriter { file: Limited::new(file), path, len: 0 };
        let error = writer.append(&StepRecord { step: 1, ..Default::default() }.into()).unwrap_err().to_string();
        assert!(error.contains("append to /dev/full") && error.contains("No space"), "{error}");
        assert_eq!(writer.len, 0);
    }

    #[test]
    fn the_rest_of_a_failed_write_is_cut_before_the_next_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.append(&StepRecord { step: 1, ..Default::default() }.into()).unwrap();
        writer.file.write_all(b"{\"step\":2,\"lo").unwrap();
        writer.append(&StepRecord { step: 2, ..Default::default() }.into()).unwrap();
        let steps: Vec<u64> = read(&path).unwrap().iter().map(Record::step).collect();
        assert_eq!(steps, [1, 2]);
    }
}
