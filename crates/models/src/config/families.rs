//! Families as data: how each `model_type` translates into the switches of [`ModelConfig`].

use espalier_adapters::module::NormKind;
use espalier_kernels::activation::Activation;

use super::{HeadSpec, Json, ModelConfig, Names, NormPlacement, Positions, Projections, RopeSpec};
use crate::Result;

/// Values of `model_type` that are read.
pub const SUPPORTED: &[&str] = &["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gpt2", "bert", "roberta"];

const LLAMA: Names = Names {
    base: "model",
    embed: "embed_tokens",
    position: "",
    token_type: "",
    embed_norm: "",
    layers: "layers",
    qkv: Projections::Split(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    o: "self_attn.o_proj",
    gate_up: Projections::Split(&["mlp.gate_proj", "mlp.up_proj"]),
    down: "mlp.down_proj",
    norms: &["input_layernorm", "post_attention_layernorm"],
    norm: "norm",
    head: "lm_head",
};

const PHI3: Names =
    Names { qkv: Projections::Fused("self_attn.qkv_proj"), gate_up: Projections::Fused("mlp.gate_up_proj"), ..LLAMA };

const GEMMA2: Names = Names {
    norms: &["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"],
    ..LLAMA
};

const GPT2: Names = Names {
    base: "transformer",
    embed: "wte",
    position: "wpe",
    layers: "h",
    qkv: Projections::Fused("attn.c_attn"),
    o: "attn.c_proj",
    gate_up: Projections::Split(&["mlp.c_fc"]),
    down: "mlp.c_proj",
    norms: &["ln_1", "ln_2"],
    norm: "ln_f",
    ..LLAMA
};

const BERT: Names = Names {
    base: "bert",
    embed: "embeddings.word_embeddings",
    position: "embeddings.position_embeddings",
    token_type: "embeddings.token_type_embeddings",
    embed_norm: "embeddings.LayerNorm",
    layers: "encoder.layer",
    qkv: Projections::Split(&["attention.self.query", "attention.self.key", "attention.self.value"]),
    o: "attention.output.dense",
    gate_up: Projections::Split(&["intermediate.dense"]),
    down: "output.dense",
    norms: &["attention.output.LayerNorm", "output.LayerNorm"],
    norm: "",
    head: "classifier",
};

const ROBERTA: Names = Names { base: "roberta", ..BERT };

/// Translates a `config.json`.
pub(super) fn translate(json: &Json<'_>) -> Result<ModelConfig> {
    let family = json.str_opt("model_type")?.unwrap_or("");
    match family {
        "llama" | "mistral" | "qwen2" | "qwen3" | "phi3" | "gemma2" => decoder(json, family),
        "gpt2" => gpt2(json),
        "bert" | "roberta" => encoder(json, family),
        _ => {
            let architectures = json.get("architectures").map(ToString::to_string).unwrap_or_else(|| "none".into());
            let found = if family.is_empty() { "no model_type".into() } else { format!("`{family}`") };
            Err(json.error(
                "model_type",
                format!(
                    "found {found} (architectures: {architectures}), which is not supported (supported: {})",
                    SUPPORTED.join(", ")
                ),
            ))
        }
    }
}

/// `wanted` if the list of `architectures` says so or says nothing.
fn expect_causal(json: &Json<'_>) -> Result<()> {
    let names: Vec<&str> =
        json.get("architectures").and_then(|v| v.as_array()).into_iter().flatten().filter_map(|v| v.as_str()).collect();
    match names.iter().find(|n| !n.ends_with("ForCausalLM") && !n.ends_with("LMHeadModel") && !n.ends_with("Model")) {
        Some(other) => Err(json.error("architectures", format!("`{other}` is not supported for this model_type"))),
        None => Ok(()),
    }
}

fn activation(json: &Json<'_>, key: &str, default: &str) -> Result<Activation> {
    let name = json.str_opt(key)?.unwrap_or(default);
    Activation::from_name(name).ok_or_else(|| json.error(key, format!("activation `{name}` is not supported")))
}

fn decoder(json: &Json<'_>, family: &str) -> Result<ModelConfig> {
    expect_causal(json)?;
    let hidden = json.size("hidden_size")?;
    let heads = json.size("num_attention_heads")?;
    let layers = json.layers("num_hidden_layers")?;
    let head_dim = json.size_or("head_dim", if family == "gemma2" { 256 } else { hidden / heads })?;
    if !head_dim.is_multiple_of(2) {
        return Err(json.error("head_dim", format!("{head_dim} is odd: rotary positions turn pairs")));
    }
    let kv_heads = json.size_or("num_key_value_heads", heads)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(json.error("num_key_value_heads", format!("{heads} query heads are not divisible by {kv_heads}")));
    }
    let gemma = family == "gemma2";
    let activation = match (gemma, json.get("hidden_activation")) {
        (true, Some(_)) => activation(json, "hidden_activation", "gelu_pytorch_tanh")?,
        (true, None) => Activation::GeluTanh,
        (false, _) => activation(json, "hidden_act", "silu")?,
    };
    let attention_bias = json.bool_or("attention_bias", false)?;
    let scale = if gemma { json.f64_or("query_pre_attn_scalar", 256.0)? } else { head_dim as f64 };
    let default_softcaps = (gemma && json.raw().get("attn_logit_softcapping").is_none()).then_some((50.0, 30.0));
    let eps = json.f64_or("rms_norm_eps", 1e-6)?;
    Ok(ModelConfig {
        family: family.into(),
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate: json.size("intermediate_size")?,
        vocab: json.size("vocab_size")?,
        max_positions: json.usize_or("max_position_embeddings", 2048)?,
        norm: NormKind::Rms { eps, offset: if gemma { 1.0 } else { 0.0 } },
        placement: if gemma { NormPlacement::Sandwich } else { NormPlacement::Pre },
        activation,
        gated: true,
        qkv_bias: family == "qwen2" || (family != "phi3" && attention_bias),
        o_bias: family != "phi3" && family != "qwen2" && attention_bias,
        mlp_bias: json.bool_or("mlp_bias", false)?,
        qk_norm: family == "qwen3",
        positions: Positions::Rope(RopeSpec::read(json, head_dim)?),
        windows: windows(json, family, layers)?,
        attention_scale: scale.powf(-0.5),
        attention_softcap: json.f64_opt("attn_logit_softcapping")?.or(default_softcaps.map(|c| c.0)),
        final_softcap: json.f64_opt("final_logit_softcapping")?.or(default_softcaps.map(|c| c.1)),
        embed_scale: gemma.then(|| (hidden as f64).sqrt()),
        causal: true,
        tied: json.bool_or("tie_word_embeddings", gemma)?,
        transposed: false,
        token_types: None,
        final_norm: true,
        head: HeadSpec::Causal,
        names: match family {
            "phi3" => PHI3,
            "gemma2" => GEMMA2,
            _ => LLAMA,
        },
        pad_id: json.ids("pad_token_id")?.first().copied(),
        eos_ids: json.ids("eos_token_id")?,
        bos_id: json.ids("bos_token_id")?.first().copied(),
        raw: json.raw().clone(),
    })
}

/// The attention window of each layer.
fn windows(json: &Json<'_>, family: &str, layers: usize) -> Result<Vec<Option<usize>>> {
    let default = if family == "gemma2" { Some(4096) } else { None };
    let window = match json.raw().get("sliding_window") {
        Some(_) => json.usize_opt("sliding_window")?,
        None => default,
    };
    if window == Some(0) {
        return Err(json.error("sliding_window", "must be at least 1, or null"));
    }
    let qwen = family == "qwen2" || family == "qwen3";
    let window = if qwen && !json.bool_or("use_sliding_window", false)? { None } else { window };
    if let Some(types) = json.get("layer_types").and_then(|v| v.as_array())
        && (qwen || family == "gemma2")
    {
        if types.len() != layers {
            return Err(json.error("layer_types", format!("has {} entries for {layers} layers", types.len())));
        }
        return types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(window),
                _ => Err(json.error("layer_types", format!("{t} is not supported"))),
            })
            .collect();
    }
    Ok(match family {
        "gemma2" => (0..layers).map(|i| if i % 2 == 0 { window } else { None }).collect(),
        "qwen2" | "qwen3" => {
            let first = json.usize_or("max_window_layers", 28)?;
            (0..layers).map(|i| if i >= first { window } else { None }).collect()
        }
        "mistral" | "phi3" => vec![window; layers],
        _ => vec![None; layers],
    })
}

fn gpt2(json: &Json<'_>) -> Result<ModelConfig> {
    expect_causal(json)?;
    for key in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
        if json.bool_or(key, false)? {
            return Err(json.error(key, "is not supported"));
        }
    }
    let hidden = json.size("n_embd")?;
    let heads = json.heads("n_head", hidden)?;
    let layers = json.layers("n_layer")?;
    let positions = json.size("n_positions")?;
    let head_dim = hidden / heads;
    Ok(ModelConfig {
        family: "gpt2".into(),
        hidden,
        layers,
        heads,
        kv_heads: heads,
        head_dim,
        intermediate: json.size_or("n_inner", 4 * hidden)?,
        vocab: json.size("vocab_size")?,
        max_positions: positions,
        norm: NormKind::Layer { eps: json.f64_or("layer_norm_epsilon", 1e-5)? },
        placement: NormPlacement::Pre,
        activation: activation(json, "activation_function", "gelu_new")?,
        gated: false,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: false,
        positions: Positions::Learned { rows: positions, offset: 0 },
        windows: vec![None; layers],
        attention_scale: if json.bool_or("scale_attn_weights", true)? { (head_dim as f64).powf(-0.5) } else { 1.0 },
        attention_softcap: None,
        final_softcap: None,
        embed_scale: None,
        causal: true,
        tied: json.bool_or("tie_word_embeddings", true)?,
        transposed: true,
        token_types: None,
        final_norm: true,
        head: HeadSpec::Causal,
        names: GPT2,
        pad_id: json.ids("pad_token_id")?.first().copied(),
        eos_ids: json.ids("eos_token_id")?,
        bos_id: json.ids("bos_token_id")?.first().copied(),
        raw: json.raw().clone(),
    })
}

fn encoder(json: &Json<'_>, family: &str) -> Result<ModelConfig> {
    let hidden = json.size("hidden_size")?;
    let heads = json.heads("num_attention_heads", hidden)?;
    let layers = json.layers("num_hidden_layers")?;
    if let Some(kind) = json.str_opt("position_embedding_type")?
        && kind != "absolute"
    {
        return Err(json.error("position_embedding_type", format!("`{kind}` is not supported (supported: absolute)")));
    }
    if json.bool_or("is_decoder", false)? {
        return Err(json.error("is_decoder", "an encoder used as a decoder is not supported"));
    }
    let labels = match json.get("id2label").and_then(|v| v.as_object()) {
        Some(map) => map.len(),
        None => json.usize_or("num_labels", 2)?,
    };
    let roberta = family == "roberta";
    let pad = json.ids("pad_token_id")?.first().copied();
    let rows = json.usize_or("max_position_embeddings", 512)?;
    let offset = if roberta { pad.unwrap_or(1) as usize + 1 } else { 0 };
    Ok(ModelConfig {
        family: family.into(),
        hidden,
        layers,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        intermediate: json.size("intermediate_size")?,
        vocab: json.size("vocab_size")?,
        max_positions: rows.saturating_sub(offset),
        norm: NormKind::Layer { eps: json.f64_or("layer_norm_eps", 1e-12)? },
        placement: NormPlacement::Post,
        activation: activation(json, "hidden_act", "gelu")?,
        gated: false,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: false,
        positions: Positions::Learned { rows, offset },
        windows: vec![None; layers],
        attention_scale: ((hidden / heads) as f64).powf(-0.5),
        attention_softcap: None,
        final_softcap: None,
        embed_scale: None,
        causal: false,
        tied: false,
        transposed: false,
        token_types: Some(json.usize_or("type_vocab_size", 2)?),
        final_norm: false,
        head: if roberta { HeadSpec::Dense { labels } } else { HeadSpec::Pooled { labels } },
        names: if roberta { ROBERTA } else { BERT },
        pad_id: pad,
        eos_ids: json.ids("eos_token_id")?,
        bos_id: json.ids("bos_token_id")?.first().copied(),
        raw: json.raw().clone(),
    })
}
