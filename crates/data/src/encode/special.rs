//! Special tokens of a model folder: which they are, their ids, and where generation ends.
//!
//! Read from `tokenizer_config.json` and `special_tokens_map.json`; where neither names one, from the ids of
//! `generation_config.json` and `config.json`; the end of sequence at last by the names in common use.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::folder::read_json;
use crate::error::Result;

/// Names of the end of sequence where no file tells.
const ENDS: [&str; 4] = ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"];

/// Special tokens: text and id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<(String, u32)>,
    /// End of sequence.
    pub eos: Option<(String, u32)>,
    /// Padding.
    pub pad: Option<(String, u32)>,
    /// Whether `tokenizer_config.json` says that texts begin with the beginning-of-sequence token.
    pub add_bos: bool,
    /// Further ids at which generation ends.
    pub stop: Vec<u32>,
    /// All named special tokens (`bos_token`, ...) as chat templates see them.
    pub named: BTreeMap<String, String>,
}

impl SpecialTokens {
    /// The special tokens that a model folder declares.
    pub fn from_folder(folder: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let mut named = BTreeMap::new();
        let mut add_bos = false;
        for name in ["special_tokens_map.json", "tokenizer_config.json"] {
            let file = folder.join(name);
            if !file.is_file() {
                continue;
            }
            let config = read_json(&file)?;
            add_bos |= config.get("add_bos_token").and_then(Value::as_bool) == Some(true);
            for (key, value) in config.as_object().into_iter().flatten() {
                let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
                if let Some(text) = text.filter(|_| key.ends_with("_token")) {
                    named.insert(key.clone(), text.to_string());
                }
            }
        }
        let mut by_id = BTreeMap::new();
        let mut stop = Vec::new();
        for name in ["config.json", "generation_config.json"] {
            let file = folder.join(name);
            if !file.is_file() {
                continue;
            }
            let config = read_json(&file)?;
            for key in ["bos_token", "eos_token", "pad_token"] {
                let ids: Vec<u32> = match config.get(format!("{key}_id")) {
                    Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
                    Some(value) => id(value).into_iter().collect(),
                    None => Vec::new(),
                };
                if let Some(first) = ids.first() {
                    by_id.entry(key).or_insert(*first);
                }
                if key == "eos_token" {
                    stop.extend(ids);
                }
            }
        }
        for (key, id) in by_id {
            if !named.contains_key(key)
                && let Some(text) = tokenizer.id_to_token(id)
            {
                named.insert(key.to_string(), text);
            }
        }
        if !named.contains_key("eos_token")
            && let Some(end) = ENDS.into_iter().find(|end| tokenizer.token_to_id(end).is_some())
        {
            named.insert("eos_token".into(), end.to_string());
        }
        stop.retain(|id| tokenizer.id_to_token(*id).is_some());
        stop.sort_unstable();
        stop.dedup();
        let find = |key: &str| named.get(key).and_then(|text| Some((text.clone(), tokenizer.token_to_id(text)?)));
        Ok(Self { bos: find("bos_token"), eos: find("eos_token"), pad: find("pad_token"), add_bos, stop, named })
    }

    /// Special tokens by name: `bos_token`, `eos_token`, `pad_token` and whatever a template needs.
    pub fn named(tokenizer: &Tokenizer, named: BTreeMap<String, String>) -> Self {
        let find = |key: &str| named.get(key).and_then(|text| Some((text.clone(), tokenizer.token_to_id(text)?)));
        Self {
            bos: find("bos_token"),
            eos: find("eos_token"),
            pad: find("pad_token"),
            add_bos: false,
            stop: Vec::new(),
            named,
        }
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
