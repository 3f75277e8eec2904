"""Tiny random base models of every supported family with the logits transformers computes for them.

golden/families/<name>/: config.json + model.safetensors (as `save_pretrained` of transformers 5 writes them),
config.v4.json (the same model described with the keys of transformers 4: rope_theta, rope_scaling, torch_dtype),
expected.safetensors: ids [2, 12] i64 and logits [2, 12, V] (or [2, labels]); where windows, rope scaling or padding
matter also ids_long [1, 48] / logits_long, ids_pad / mask_pad / logits_pad, type_ids / logits_types; for two
families labels, loss and grad.<parameter>.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers as hf

from common import FF, GOLDEN, HEADS, HIDDEN, KV_HEADS, LONG, SHORT, SMALL_VOCAB, VOCAB, fresh, randomise, save_json, save_tensors, token_ids

LLAMA = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FF, num_hidden_layers=2, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
# The variants whose subject is one switch have one layer, a smaller vocabulary and tied embeddings, to stay small.
SMALL = LLAMA | dict(vocab_size=SMALL_VOCAB, num_hidden_layers=1, intermediate_size=48, tie_word_embeddings=True)
ENCODER = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FF, num_hidden_layers=2, num_attention_heads=HEADS,
    max_position_embeddings=40, num_labels=3,
)


def rope(kind="default", theta=10000.0, **more):
    """`rope_parameters` as transformers 5 writes it."""
    return dict(rope_type=kind, rope_theta=theta, **more)


# name: (config, extra checks among long, pad, types, grad). Some epsilons are larger than real models', so that a reader
# that ignores them fails the comparison.
FAMILIES = {
    "llama1": lambda: (hf.LlamaConfig(**LLAMA | dict(num_key_value_heads=HEADS), tie_word_embeddings=False, rms_norm_eps=1e-3, rope_parameters=rope()), ()),
    "llama_gqa_tied": lambda: (hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope(theta=500000.0)), ("grad",)),
    "llama3_rope": lambda: (hf.LlamaConfig(**SMALL, rope_parameters=rope("llama3", 100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)), ("long",)),
    "llama_linear": lambda: (hf.LlamaConfig(**SMALL, rope_parameters=rope("linear", factor=2.5)), ("long",)),
    "llama_dynamic": lambda: (hf.LlamaConfig(**SMALL | dict(max_position_embeddings=16), rope_parameters=rope("dynamic", factor=2.0)), ("long",)),
    "llama_yarn": lambda: (hf.LlamaConfig(**SMALL, rope_parameters=rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=32)), ("long",)),
    "llama_bias": lambda: (hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=rope()), ()),
    "mistral": lambda: (hf.MistralConfig(**LLAMA, sliding_window=16, tie_word_embeddings=False, rope_parameters=rope()), ("long",)),
    "qwen2": lambda: (hf.Qwen2Config(**LLAMA, use_sliding_window=False, sliding_window=16, max_window_layers=1, tie_word_embeddings=True, rope_parameters=rope(theta=1000000.0)), ("long",)),
    "qwen3": lambda: (hf.Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=True, rope_parameters=rope(theta=1000000.0)), ()),
    "phi3": lambda: (hf.Phi3Config(**LLAMA, sliding_window=16, original_max_position_embeddings=128, tie_word_embeddings=False, rope_parameters=rope()), ("long",)),
    "phi3_longrope": lambda: (hf.Phi3Config(**SMALL | dict(max_position_embeddings=64), original_max_position_embeddings=16,
        rope_parameters=rope("longrope", short_factor=[1.0, 1.1, 1.25, 1.5], long_factor=[1.2, 2.0, 3.5, 4.0])), ("long",)),
    "phi3_partial": lambda: (hf.Phi3Config(**SMALL | dict(num_attention_heads=2, num_key_value_heads=1), original_max_position_embeddings=128,
        rope_parameters=rope(partial_rotary_factor=0.75)), ()),
    "gemma2": lambda: (hf.Gemma2Config(**LLAMA, head_dim=16, query_pre_attn_scalar=12, sliding_window=16, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0, tie_word_embeddings=True, rope_parameters=rope()), ("long",)),
    "gpt2": lambda: (hf.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_positions=48, n_inner=FF, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), ("grad",)),
    "bert": lambda: (hf.BertConfig(**ENCODER, layer_norm_eps=1e-3, pad_token_id=0), ("pad", "types")),
    "roberta": lambda: (hf.RobertaConfig(**ENCODER | dict(type_vocab_size=1), layer_norm_eps=2e-3, pad_token_id=1, bos_token_id=0, eos_token_id=2), ("pad",)),
}

MODEL_CLASS = {"bert": hf.BertForSequenceClassification, "roberta": hf.RobertaForSequenceClassification}


def class_for(name):
    """The transformers class that loads the family `name`."""
    return MODEL_CLASS.get(name, hf.AutoModelForCausalLM)


def load(name, folder=None):
    """The golden base model `name` in eval mode, loaded from its folder."""
    model = class_for(name).from_pretrained(folder or GOLDEN / "families" / name, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def vocab_of(name):
    """Vocabulary size of a family, read from its golden folder."""
    return json.loads((GOLDEN / "families" / name / "config.json").read_text())["vocab_size"]


def ids_for(name):
    """The short probe batch [2, 12] of a family; its adapters are probed with the same ids."""
    return token_ids(f"families/{name}/ids", 2, SHORT, vocab_of(name))


def legacy_config(config: dict) -> dict:
    """The keys transformers 4 would have written for the same model."""
    out = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype", "transformers_version", "layer_types")}
    out["torch_dtype"] = config.get("dtype", "float32")
    out["transformers_version"] = "4.44.0"
    if "rope_parameters" in config:
        r = dict(config["rope_parameters"])
        kind, out["rope_theta"] = r.pop("rope_type"), r.pop("rope_theta")
        partial = r.pop("partial_rotary_factor", 1.0)
        if partial != 1.0:
            out["partial_rotary_factor"] = partial
        if kind == "longrope":
            r.pop("original_max_position_embeddings", None)
        out["rope_scaling"] = None if kind == "default" else {("rope_type" if kind == "llama3" else "type"): kind, **r}
    if out["model_type"] == "qwen2":
        # transformers 4 kept the unused width beside use_sliding_window = false; a reader must not apply it.
        out["sliding_window"] = 16
    return out


@torch.no_grad()
def expectations(name, checks, folder):
    """The tensors of expected.safetensors, each from a freshly loaded model (dynamic rope keeps state between calls)."""
    ids = ids_for(name)
    out = {"ids": ids, "logits": load(name, folder)(input_ids=ids).logits}
    if "long" in checks:
        long = token_ids(f"families/{name}/ids_long", 1, LONG, vocab_of(name))
        out |= {"ids_long": long, "logits_long": load(name, folder)(input_ids=long).logits}
    if "pad" in checks:
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        padded = ids.masked_fill(mask == 0, load(name, folder).config.pad_token_id)
        out |= {"ids_pad": padded, "mask_pad": mask, "logits_pad": load(name, folder)(input_ids=padded, attention_mask=mask).logits}
    if "types" in checks:
        types = (torch.arange(SHORT) >= 5).long().expand(2, -1)
        out |= {"type_ids": types, "logits_types": load(name, folder)(input_ids=ids, token_type_ids=types).logits}
    return out


GRADIENTS = {
    "llama_gqa_tied": ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.post_attention_layernorm.weight"],
    "gpt2": ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.ln_2.bias"],
}


def gradients(name):
    """Loss (mean cross entropy over shifted, labelled tokens) and its gradients for three parameters."""
    model, ids = load(name), ids_for(name)
    labels = ids.clone()
    labels[0, :4] = -100
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    params = dict(model.named_parameters())
    return {"labels": labels, "loss": loss.reshape(1)} | {f"grad.{k}": params[k].grad for k in GRADIENTS[name]}


def make():
    """Write golden/families."""
    fresh(GOLDEN / "families")
    for name, build in FAMILIES.items():
        config, checks = build()
        config._attn_implementation = "eager"
        model = (MODEL_CLASS[name](config) if name in MODEL_CLASS else hf.AutoModelForCausalLM.from_config(config)).float().eval()
        randomise(model, f"families/{name}")
        folder = GOLDEN / "families" / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        expected = expectations(name, checks, folder)
        legacy = legacy_config(json.loads((folder / "config.json").read_text()))
        save_json(folder / "config.v4.json", legacy)
        check_legacy(name, checks, folder, expected)
        if "grad" in checks:
            expected |= gradients(name)
        save_tensors(folder / "expected.safetensors", expected)
        print(f"{name:16} logits std {expected['logits'].std():.3f}")


def check_legacy(name, checks, folder, expected):
    """transformers itself must read config.v4.json as the same model."""
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "config.json").write_text((folder / "config.v4.json").read_text())
        (Path(tmp) / "model.safetensors").symlink_to(folder / "model.safetensors")
        for key, value in expectations(name, checks, tmp).items():
            assert torch.equal(value, expected[key]), f"{name}: config.v4.json gives other {key}"
