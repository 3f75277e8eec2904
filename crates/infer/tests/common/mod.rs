//! A tiny random Llama and a byte-level tokenizer made in code.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::Path;

use espalier_data::{ChatTemplate, SpecialTokens, TextCodec};
use espalier_models::{LoadOptions, Model, ModelConfig};
use serde_json::{Value, json};
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

pub const VOCAB: usize = 300;
pub const BOS: u32 = 256;
pub const EOS: u32 = 257;

const TEMPLATE: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|>{% endif %}";

/// 256 bytes, `<s>`, `</s>`, and pairs of letters.
pub fn codec() -> TextCodec {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    let mut vocab: BTreeMap<String, u32> = bytes.iter().zip(0..).map(|(c, id)| (c.to_string(), id)).collect();
    vocab.insert("<s>".into(), BOS);
    vocab.insert("</s>".into(), EOS);
    let mut merges = Vec::new();
    for (a, b) in "abcdefg".chars().flat_map(|a| "aeiouy".chars().map(move |b| (a, b))) {
        vocab.insert(format!("{a}{b}"), vocab.len() as u32);
        merges.push(json!([a.to_string(), b.to_string()]));
    }
    assert_eq!(vocab.len(), VOCAB);
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let description = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")],
        "normalizer": null, "pre_tokenizer": bytes, "decoder": bytes,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    });
    let tokenizer = Tokenizer::from_bytes(serde_json::to_vec(&description).unwrap()).unwrap();
    let named = BTreeMap::from([("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())]);
    let specials = SpecialTokens::named(&tokenizer, named);
    let template = ChatTemplate::new(TEMPLATE, specials.named.clone()).unwrap();
    TextCodec::new(tokenizer, Some(template), specials).unwrap()
}

fn build(raw: Value, seed: u64) -> Model {
    let config = ModelConfig::from_json(Path::new("config.json"), raw).unwrap();
    Model::random(config, &LoadOptions { seed, ..LoadOptions::cpu() }).unwrap()
}

/// A Llama with changed keys.
pub fn llama_with(changes: Value, seed: u64) -> Model {
    let mut raw = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "initializer_range": 0.3,
        "bos_token_id": BOS, "eos_token_id": EOS
    });
    for (key, value) in changes.as_object().unwrap() {
        raw[key] = value.clone();
    }
    build(raw, seed)
}

/// A Llama.
pub fn llama() -> Model {
    llama_with(json!({}), 3)
}

/// A BERT with three labels.
pub fn classifier() -> Model {
    build(
        json!({
            "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": VOCAB,
            "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu", "initializer_range": 0.3,
            "id2label": {"0": "no", "1": "maybe", "2": "yes"}, "pad_token_id": 0
        }),
        5,
    )
}
