//! Tokenizers, templates and files for the tests.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use espalier_data::{ChatTemplate, SpecialTokens, TextCodec};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// Id of the first special token: 256 bytes and 7 merges come before.
pub(crate) const FIRST_SPECIAL: u32 = 263;

/// The description of a byte-level tokenizer: 256 bytes, a few merges, and these special tokens from id 263 on.
pub(crate) fn tokenizer_json(specials: &[&str]) -> Value {
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: BTreeMap<String, u32> =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), id as u32)).collect();
    let mut merges = Vec::new();
    for (a, b) in [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("Ġ", "hello")] {
        let id = vocab.len() as u32;
        vocab.insert(format!("{a}{b}"), id);
        merges.push(json!([a, b]));
    }
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(at, token)| {
            json!({"id": FIRST_SPECIAL + at as u32, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    })
}

pub(crate) fn tokenizer(specials: &[&str]) -> Tokenizer {
    Tokenizer::from_bytes(serde_json::to_vec(&tokenizer_json(specials)).unwrap()).unwrap()
}

pub(crate) fn names(eos: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("bos_token".into(), "<s>".into()), ("eos_token".into(), eos.into())])
}

pub(crate) const ALL: [&str; 14] = [
    "</s>",
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|system|>",
];

/// A codec with all special tokens, `</s>` as the end of sequence, and a template if given.
pub(crate) fn codec(template: Option<&str>) -> TextCodec {
    let tokenizer = tokenizer(&ALL);
    let specials = SpecialTokens::named(&tokenizer, names("</s>"));
    let template = template.map(|text| ChatTemplate::new(text, names("</s>")).unwrap());
    TextCodec::new(tokenizer, template, specials).unwrap()
}

pub(crate) const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub(crate) fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// The text of the trained tokens.
pub(crate) fn trained_text(codec: &TextCodec, example: &espalier_data::Example) -> String {
    let ids: Vec<u32> = example
        .input_ids
        .iter()
        .zip(&example.labels)
        .filter(|(_, label)| **label != espalier_data::IGNORE)
        .map(|(id, _)| *id)
        .collect();
    codec.decode(&ids, false).unwrap()
}
