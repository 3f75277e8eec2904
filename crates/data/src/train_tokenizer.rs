//! Trains a byte-level BPE tokenizer and writes it as a tokenizer folder.
//!
//! Source: byte-level BPE as in GPT-2 (Radford et al. 2019); digits are split one by one, so that numbers have one form
//! each; ChatML marks turns

use std::io::Write;
use std::path::Path;

use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{DataError, Result};
use crate::faults;
use crate::row::Row;
use crate::source::Source;

/// Ends a document; also the padding token.
const END_OF_TEXT: &str = "<|endoftext|>";
const TURN_START: &str = "<|im_start|>";
const TURN_END: &str = "<|im_end|>";

const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n\
{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// What kind of tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerOptions {
    /// Tokens, the 256 bytes and the special ones included.
    pub vocab_size: usize,
    /// Chat template; ChatML if None.
    pub chat_template: Option<String>,
}

/// The text of a row, as far as a tokenizer should know it.
fn text_of(row: Row) -> Vec<String> {
    match row {
        Row::Text { text } => vec![text],
        Row::Messages { messages, .. } => messages.into_iter().map(|m| m.content).collect(),
        Row::PromptCompletion { prompt, completion } => vec![prompt, completion],
        Row::Classification { text, text_pair, .. } => std::iter::once(text).chain(text_pair).collect(),
        Row::Tokens { .. } | Row::Preference { .. } => Vec::new(),
    }
}

/// Trains on the rows of `source` and writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into
/// `folder`. Returns the number of tokens and of rows read.
///
/// # Errors
/// If a row is bad, there is no text, or a file cannot be written.
pub fn train_tokenizer(source: &Source, options: &TokenizerOptions, folder: &Path) -> Result<(usize, u64)> {
    let fault = |e: tokenizers::Error| DataError::Tokenizer { path: folder.to_owned(), message: e.to_string() };
    let special = [END_OF_TEXT, TURN_START, TURN_END];
    let least = 256 + special.len();
    if options.vocab_size < least {
        let message = format!("{} is too small: bytes and special tokens take {least}", options.vocab_size);
        return Err(DataError::Option { key: "vocab_size", message });
    }
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(options.vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special.map(|t| AddedToken::from(t, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Digits(Digits::new(true)),
        PreTokenizerWrapper::ByteLevel(bytes),
    ])));
    tokenizer.with_decoder(Some(bytes));
    let mut rows = 0;
    let mut failure = None;
    let texts = source.rows().map_while(|row| match row {
        Ok((_, row)) => {
            rows += 1;
            Some(text_of(row))
        }
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    // The trainer wants to move the texts between threads; reading them stays on this one.
    let texts: Vec<String> = texts.flatten().collect();
    if let Some(error) = failure {
        return Err(error);
    }
    if texts.is_empty() {
        return Err(DataError::Tokenizer { path: folder.to_owned(), message: "the data hold no text".into() });
    }
    tokenizer.train(&mut trainer, texts.into_iter()).map_err(fault)?;
    std::fs::create_dir_all(folder).map_err(DataError::io(folder))?;
    let json = tokenizer.to_string(true).map_err(fault)?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 1_000_000,
    });
    let template = options.chat_template.as_deref().unwrap_or(CHATML);
    let config = format!("{config:#}\n");
    // The tokenizer goes first and comes last: a folder without it is none, whatever else is there.
    write(folder, &[("tokenizer_config.json", &config), ("chat_template.jinja", template), ("tokenizer.json", &json)])?;
    Ok((tokenizer.get_vocab_size(true), rows))
}

/// Writes files that belong together: all beside their places first, then each into its own. The last one is never there beside
/// another of the earlier set.
fn write(folder: &Path, files: &[(&str, &str)]) -> Result<()> {
    let mut ready = Vec::with_capacity(files.len());
    for (name, text) in files {
        let path = folder.join(name);
        let run = || -> std::io::Result<tempfile::NamedTempFile> {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            let mut left = text.as_bytes();
            while !left.is_empty() {
                let (now, rest) = left.split_at(faults::allowed(left.len())?);
                file.write_all(now)?;
                left = rest;
            }
            file.as_file().sync_all()?;
            Ok(file)
        };
        ready.push((run().map_err(DataError::io(&path))?, path));
    }
    if let Some((_, last)) = ready.last() {
        let removed = faults::instant().and_then(|()| match std::fs::remove_file(last) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        });
        removed.map_err(DataError::io(last))?;
    }
    for (file, path) in ready {
        faults::instant().map_err(DataError::io(&path))?;
        file.persist(&path).map_err(|e| DataError::io(&path)(e.error))?;
    }
    Ok(())
}
