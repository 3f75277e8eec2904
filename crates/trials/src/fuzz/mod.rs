//! Readers of files of others, each as a function of bytes: for the fuzzer of `fuzz/`, and for the bounded trial of R-36.
//!
//! A target must come back from any bytes, with a value or an error: a panic, a hang or memory without bound is a defect.

mod corpus;
mod mutate;
mod targets;

use anyhow::Result;

pub use mutate::input;

/// A reader to try.
#[derive(Debug)]
pub struct Target {
    /// Its name, and that of its file in `fuzz/fuzz_targets`.
    pub name: &'static str,
    /// Reads the bytes as a file of its kind, and uses what it gives.
    pub run: fn(&[u8]),
    /// Well-formed inputs to start from.
    pub corpus: fn() -> Result<Vec<Vec<u8>>>,
    /// Words that mean something in such files.
    pub words: &'static [&'static str],
}

/// All targets.
pub static TARGETS: &[Target] = &[
    Target { name: "safetensors", run: targets::safetensors, corpus: corpus::safetensors, words: corpus::HEADER_WORDS },
    Target {
        name: "adapter_config",
        run: targets::adapter_config,
        corpus: corpus::adapter_config,
        words: corpus::CONFIG_WORDS,
    },
    Target { name: "gguf", run: targets::gguf, corpus: corpus::gguf, words: corpus::GGUF_WORDS },
    Target { name: "tokenizer", run: targets::tokenizer, corpus: corpus::tokenizer, words: corpus::TOKENIZER_WORDS },
    Target {
        name: "chat_template",
        run: targets::chat_template,
        corpus: corpus::chat_template,
        words: corpus::TEMPLATE_WORDS,
    },
    Target { name: "recipe", run: targets::recipe, corpus: corpus::recipe, words: corpus::RECIPE_WORDS },
    Target { name: "rows_jsonl", run: targets::rows_jsonl, corpus: corpus::rows_jsonl, words: corpus::ROW_WORDS },
    Target { name: "rows_json", run: targets::rows_json, corpus: corpus::rows_json, words: corpus::ROW_WORDS },
    Target { name: "rows_csv", run: targets::rows_csv, corpus: corpus::rows_csv, words: corpus::ROW_WORDS },
    Target { name: "rows_parquet", run: targets::rows_parquet, corpus: corpus::rows_parquet, words: corpus::ROW_WORDS },
];

/// Runs the target called `name`, if there is one.
pub fn run(name: &str, bytes: &[u8]) {
    if let Some(target) = TARGETS.iter().find(|target| target.name == name) {
        (target.run)(bytes);
    }
}
