//! GGUF metadata and tensor names, translated to those of transformers.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value as Meta;
use espalier_adapters::module::GgufName;
use serde_json::{Map, Value, json};

use crate::config::ModelConfig;

/// Values of `general.architecture` that are read, with the family each is.
pub(super) const ARCHITECTURES: &[(&str, &str)] =
    &[("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("phi3", "phi3"), ("gemma2", "gemma2")];

/// A whole number or float of the metadata as JSON.
fn number(meta: &Meta) -> Option<Value> {
    Some(match meta {
        Meta::U8(v) => json!(v),
        Meta::I8(v) => json!(v),
        Meta::U16(v) => json!(v),
        Meta::I16(v) => json!(v),
        Meta::U32(v) => json!(v),
        Meta::I32(v) => json!(v),
        Meta::U64(v) => json!(v),
        Meta::I64(v) => json!(v),
        Meta::F32(v) => json!(f64::from(*v)),
        Meta::F64(v) => json!(v),
        Meta::Bool(v) => json!(v),
        _ => return None,
    })
}

/// The keys of a `config.json` that the metadata of architecture `arch` give.
pub(super) fn config(arch: &str, family: &str, metadata: &HashMap<String, Meta>) -> Map<String, Value> {
    let mut out = Map::new();
    out.insert("model_type".into(), family.into());
    let mut copy = |key: &str, to: &str| {
        if let Some(value) = metadata.get(key).and_then(number) {
            out.insert(to.into(), value);
        }
    };
    for (key, to) in [
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("context_length", "max_position_embeddings"),
        ("rope.freq_base", "rope_theta"),
        ("attention.sliding_window", "sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
    ] {
        copy(&format!("{arch}.{key}"), to);
    }
    for (key, to) in [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")] {
        copy(&format!("tokenizer.ggml.{key}_token_id"), to);
    }
    let scaling = metadata.get(&format!("{arch}.rope.scaling.type")).and_then(|v| v.to_string().ok().cloned());
    let factor = metadata.get(&format!("{arch}.rope.scaling.factor")).and_then(number);
    if let (Some(kind @ ("linear" | "yarn")), Some(factor)) = (scaling.as_deref(), factor) {
        out.insert("rope_scaling".into(), json!({"rope_type": kind, "factor": factor}));
    }
    let head = out.get("head_dim").and_then(Value::as_f64);
    let rotated = metadata.get(&format!("{arch}.rope.dimension_count")).and_then(number).and_then(|v| v.as_f64());
    let width = out.get("hidden_size").and_then(Value::as_f64);
    let heads = out.get("num_attention_heads").and_then(Value::as_f64);
    let head = head.or_else(|| Some(width? / heads.filter(|h| *h > 0.0)?));
    if let (Some(head), Some(rotated)) = (head, rotated)
        && head > 0.0
        && rotated < head
    {
        out.insert("partial_rotary_factor".into(), json!(rotated / head));
    }
    if family == "gemma2"
        && let Some(head) = head
    {
        // llama.cpp scales by the head width, except in the 27 B model, whose queries are scaled by width / heads.
        let per_head = width.zip(heads).map_or(head, |(w, h)| w / h);
        let layers = out.get("num_hidden_layers").and_then(Value::as_u64);
        out.insert("query_pre_attn_scalar".into(), json!(if layers == Some(46) { per_head } else { head }));
    }
    out
}

/// What llama.cpp calls the weight of the module at `path`, where it knows the family.
pub(crate) fn gguf_name(model: &ModelConfig, path: &str) -> Option<GgufName> {
    // Mistral's models are `llama` there.
    let family = if model.family == "mistral" { "llama" } else { model.family.as_str() };
    let (architecture, _) = ARCHITECTURES.iter().find(|(_, own)| *own == family)?;
    let interleaved = match path.rsplit('.').next()? {
        "q_proj" => Some(model.heads),
        "k_proj" => Some(model.kv_heads),
        _ => None,
    };
    Some(GgufName {
        architecture: (*architecture).into(),
        tensor: tensor_name(family, &format!("{path}.weight"))?,
        interleaved: interleaved.filter(|_| is_interleaved(architecture)),
    })
}

/// Whether rows of q and k are stored pairwise interleaved in files of architecture `arch`.
pub(super) fn is_interleaved(arch: &str) -> bool {
    arch == "llama"
}

/// The name in a GGUF file of the tensor that transformers calls `name`.
pub(super) fn tensor_name(family: &str, name: &str) -> Option<String> {
    match name {
        "lm_head.weight" => return Some("output.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        _ => {}
    }
    let rest = name.strip_prefix("model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (module, part) = rest.rsplit_once('.')?;
    let own = match (family, module) {
        ("gemma2", "post_attention_layernorm") => "post_attention_norm",
        ("gemma2", "pre_feedforward_layernorm") => "ffn_norm",
        ("gemma2", "post_feedforward_layernorm") => "post_ffw_norm",
        (_, "input_layernorm") => "attn_norm",
        (_, "post_attention_layernorm") => "ffn_norm",
        (_, "self_attn.q_proj") => "attn_q",
        (_, "self_attn.k_proj") => "attn_k",
        (_, "self_attn.v_proj") => "attn_v",
        (_, "self_attn.qkv_proj") => "attn_qkv",
        (_, "self_attn.o_proj") => "attn_output",
        (_, "self_attn.q_norm") => "attn_q_norm",
        (_, "self_attn.k_norm") => "attn_k_norm",
        (_, "mlp.gate_proj") => "ffn_gate",
        (_, "mlp.up_proj" | "mlp.gate_up_proj") => "ffn_up",
        (_, "mlp.down_proj") => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{own}.{part}"))
}
