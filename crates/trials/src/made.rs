//! Models with random weights of any shape, as folders: for trials whose subject is the size.

use std::path::Path;

use anyhow::Result;
use espalier_models::export::ExportOptions;
use espalier_models::{LoadOptions, Model, ModelConfig};
use serde_json::{Value, json};

/// The shape of a made model.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Width.
    pub hidden: usize,
    /// Width of the feed-forward part.
    pub ff: usize,
    /// Blocks.
    pub layers: usize,
    /// Tokens known.
    pub vocab: usize,
}

/// Positions of every made model.
const POSITIONS: usize = 512;

/// A decoder with rotary positions, grouped heads and a head of its own.
pub fn llama(shape: Shape) -> Value {
    let heads = shape.hidden / 64;
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.ff, "num_hidden_layers": shape.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads / 2, "vocab_size": shape.vocab, "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    })
}

/// A decoder with learned positions, one projection for query, key and value, and a tied head.
pub fn gpt2(shape: Shape) -> Value {
    json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": shape.hidden, "n_inner": shape.ff,
        "n_layer": shape.layers, "n_head": shape.hidden / 64, "vocab_size": shape.vocab, "n_positions": POSITIONS,
        "n_ctx": POSITIONS, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    })
}

/// An encoder that sorts texts into two classes.
pub fn bert(shape: Shape) -> Value {
    json!({
        "architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_size": shape.hidden,
        "intermediate_size": shape.ff, "num_hidden_layers": shape.layers, "num_attention_heads": shape.hidden / 64,
        "vocab_size": shape.vocab, "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "num_labels": 2, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1},
    })
}

/// A decoder with norms before and after each part, soft caps and a tied head.
pub fn gemma2(shape: Shape) -> Value {
    let heads = shape.hidden / 64;
    json!({
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": shape.hidden,
        "intermediate_size": shape.ff, "num_hidden_layers": shape.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads / 2, "head_dim": 64, "vocab_size": shape.vocab,
        "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 64,
        "sliding_window": 128, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": true,
    })
}

/// Writes the model of `config` into `folder`.
///
/// # Errors
/// If the configuration is not one, or a file cannot be written.
pub fn write(folder: &Path, config: Value) -> Result<()> {
    let config = ModelConfig::from_json(&folder.join("config.json"), config)?;
    Model::random(config, &LoadOptions::cpu())?.export(folder, &ExportOptions::default())?;
    Ok(())
}
