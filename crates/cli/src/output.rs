//! The one place that prints: data to stdout, messages to stderr, JSON where a script reads it.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::fmt::Display;
use std::io::{IsTerminal, Write};

use anyhow::Result;
use serde::Serialize;

/// Where a command prints to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// The result of a command: as text, or as one line of JSON.
    pub(crate) fn result<T: Serialize + Display>(self, value: &T) -> Result<()> {
        let text = if self.json { serde_json::to_string(value)? } else { value.to_string() };
        line(&text)
    }

    /// What must be said whatever the form of the result.
    pub(crate) fn note(self, text: impl Display) {
        eprintln!("note: {text}");
    }

    /// A message for people.
    pub(crate) fn message(self, text: impl Display) {
        if !self.json {
            eprintln!("{text}");
        }
    }
}

/// One line on stdout; a closed pipe is no error.
pub(crate) fn line(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// A piece of streamed text on stdout.
pub(crate) fn piece(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// An error, its causes, and what can be done about it.
pub(crate) fn error(error: &anyhow::Error, hint: Option<&str>) {
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let paint = |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    eprintln!("{}: {error}", paint("1;31", "error"));
    let mut shown = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        if !shown.contains(&text) {
            eprintln!("  caused by: {text}");
            shown = text;
        }
    }
    if let Some(hint) = hint {
        eprintln!("{}: {hint}", paint("1;36", "hint"));
    }
}

/// Bytes as people read them.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", n as f64 / 1_073_741_824.0),
    }
}

/// Numbers with thousands set apart.
pub(crate) fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}
