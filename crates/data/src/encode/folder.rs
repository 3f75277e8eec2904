//! A tokenizer from a model folder: `tokenizer.json`, or `vocab.json` with `merges.txt`.
//!
//! The older two-file form is turned into the description that the one-file form would hold: byte-level pairs as GPT-2 and
//! RoBERTa have them, or CLIP's lower-cased words with an end-of-word mark.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::guard::guarded;
use super::{SpecialTokens, TextCodec};
use crate::error::{DataError, Result};
use crate::template::ChatTemplate;

/// A JSON file; errors name file and line.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(DataError::io(path))?;
    serde_json::from_slice(&text)
        .map_err(|error| DataError::file(path, error.line() as u64, format!("invalid JSON: {error}")))
}

impl TextCodec {
    /// The codec of a model folder, with default options: tokenizer, special tokens and chat template.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let tokenizer = tokenizer(folder)?;
        let specials = SpecialTokens::from_folder(folder, &tokenizer)?;
        let template = ChatTemplate::from_folder(folder, specials.named.clone())?;
        Self::new(tokenizer, template, specials)
    }
}

fn tokenizer(folder: &Path) -> Result<Tokenizer> {
    let fault = |path: &Path, message: String| DataError::Tokenizer { path: path.to_path_buf(), message };
    let file = folder.join("tokenizer.json");
    if file.is_file() {
        let bytes = std::fs::read(&file).map_err(DataError::io(&file))?;
        // The library does not bear JSON that is broken inside.
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes)
            .map_err(|error| DataError::file(&file, error.line() as u64, format!("invalid JSON: {error}")))?;
        check_growth(&bytes).map_err(|message| fault(&file, message))?;
        let tokenizer = guarded(|| Tokenizer::from_bytes(&bytes)).map_err(|message| fault(&file, message))?;
        check_ids(&bytes, &tokenizer).map_err(|message| fault(&file, message))?;
        return Ok(tokenizer);
    }
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if vocab.is_file() && merges.is_file() {
        let description = describe(folder, &vocab, &merges)?;
        let bytes = serde_json::to_vec(&description).map_err(|error| fault(&vocab, error.to_string()))?;
        return guarded(|| Tokenizer::from_bytes(&bytes)).map_err(|message| fault(&vocab, message));
    }
    let mut found: Vec<String> = std::fs::read_dir(folder)
        .map_err(DataError::io(folder))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    found.sort();
    let found = if found.is_empty() { "nothing".to_string() } else { found.join(", ") };
    Err(fault(
        folder,
        format!("no tokenizer here: tokenizer.json, or vocab.json with merges.txt, is needed; the folder has {found}"),
    ))
}

/// Most by which normalisers, one after the other, may multiply a text: real ones write three bytes for a space.
const GROWTH: usize = 1 << 10;

/// Replacements in a row multiply a text: a few with long contents make gigabytes of a word.
fn check_growth(bytes: &[u8]) -> std::result::Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Description {
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        decoder: Value,
    }
    fn growth(value: &Value) -> usize {
        let inner: Box<dyn Iterator<Item = &Value>> = match value {
            Value::Array(list) => Box::new(list.iter()),
            Value::Object(map) => Box::new(map.values()),
            _ => return 1,
        };
        let kind = value.get("type").and_then(Value::as_str);
        let written = if kind == Some("Prepend") { "prepend" } else { "content" };
        let own = value.get(written).and_then(Value::as_str).map_or(0, str::len).max(1);
        inner.map(growth).fold(own, usize::saturating_mul)
    }
    let description: Description = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    for (part, value) in [("normalizer", &description.normalizer), ("decoder", &description.decoder)] {
        let times = growth(value);
        if times > GROWTH {
            return Err(format!(
                "{part}: its replacements could make a text {times} times as long, more than {GROWTH}"
            ));
        }
    }
    Ok(())
}

/// Added tokens whose declared ids leave gaps are renumbered on loading without a word; that would train other embeddings.
fn check_ids(bytes: &[u8], tokenizer: &Tokenizer) -> std::result::Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Description {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(serde::Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let description: Description = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    for Added { id, content } in description.added_tokens {
        match tokenizer.token_to_id(&content) {
            Some(got) if got == id => {}
            Some(got) => {
                return Err(format!(
                    "{content:?} is declared with id {id} but would get id {got}; ids must follow each other"
                ));
            }
            None => return Err(format!("{content:?} is declared with id {id} but is no token")),
        }
    }
    Ok(())
}

fn describe(folder: &Path, vocab_file: &Path, merges_file: &Path) -> Result<Value> {
    let vocab = match read_json(vocab_file)? {
        Value::Object(map) => map,
        _ => return Err(DataError::file(vocab_file, 1, "expected an object from tokens to ids")),
    };
    let text = std::fs::read_to_string(merges_file).map_err(DataError::io(merges_file))?;
    let mut merges = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() || (at == 0 && line.starts_with("#version")) {
            continue;
        }
        let pair: Vec<&str> = line.split(' ').collect();
        match pair.as_slice() {
            [a, b] => merges.push(json!([a, b])),
            _ => return Err(DataError::file(merges_file, at as u64 + 1, "expected two tokens and one space")),
        }
    }
    let id = |token: &str| vocab.get(token).and_then(Value::as_u64);
    let clip = vocab.keys().any(|token| token.ends_with("</w>"));
    let around = |left: &str, right: &str, trim: bool| match (id(left), id(right)) {
        (Some(l), Some(r)) => json!({"type": "RobertaProcessing", "sep": [right, r], "cls": [left, l],
            "trim_offsets": trim, "add_prefix_space": false}),
        _ => json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true}),
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": !clip});
    let words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let (normalizer, pre, post, suffix) = if clip {
        (
            json!({"type": "Sequence", "normalizers": [{"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]}),
            json!({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": words},
                "behavior": "Removed", "invert": true}, bytes]}),
            around("<|startoftext|>", "<|endoftext|>", false),
            json!("</w>"),
        )
    } else {
        let post = if id("<s>") == Some(0) { around("<s>", "</s>", true) } else { around("", "", false) };
        (Value::Null, bytes, post, json!(""))
    };
    let unknown = if clip { id("<|endoftext|>").map(|_| "<|endoftext|>") } else { id("<unk>").map(|_| "<unk>") };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": special_entries(folder, &vocab)?,
        "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": "",
            "end_of_word_suffix": suffix, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    }))
}

/// Special tokens for the description: those that the folder names and those in common use, where the vocabulary has them.
fn special_entries(folder: &Path, vocab: &Map<String, Value>) -> Result<Vec<Value>> {
    let common = ["<|startoftext|>", "<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>"];
    let mut tokens: Vec<String> = common.iter().map(|token| token.to_string()).collect();
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
        let file = folder.join(name);
        if file.is_file() {
            for (key, value) in read_json(&file)?.as_object().into_iter().flatten() {
                let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
                tokens.extend(text.filter(|_| key.ends_with("_token")).map(str::to_string));
            }
        }
    }
    tokens.sort();
    tokens.dedup();
    let mut entries: Vec<(u64, String)> =
        tokens.into_iter().filter_map(|token| Some((vocab.get(&token)?.as_u64()?, token))).collect();
    entries.sort();
    Ok(entries
        .into_iter()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": token == "<mask>", "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect())
}
