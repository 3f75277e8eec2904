"""Adapters written by PEFT on the golden base models, with the logits PEFT computes.

golden/adapters/<case>/: adapter_config.json and adapter_model.safetensors as PEFT's `save_pretrained` writes them
(base_model_name_or_path replaced by the path below golden/, lists that PEFT keeps as sets sorted), expected.safetensors: ids (the base family's)
and logits. Every trainable tensor is moved off its initial value first, so that each one matters. PiSSA and OLoRA also
store logits_init, the logits right after initialisation (the base's, up to rounding), and the initial A and B of one
site as init.<key>: the product B A is determined, the signs of its factors are not.
"""

import json
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import families
from common import GOLDEN, fresh, randn, save_tensors, seed_global

ATTENTION_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LM = dict(task_type="CAUSAL_LM", lora_dropout=0.0)

# case: (base, LoraConfig arguments)
CASES = {
    "lora_all": ("llama_gqa_tied", dict(r=4, lora_alpha=8, target_modules="all-linear", **LM)),
    "rslora_patterns": ("llama_gqa_tied", dict(
        r=4, lora_alpha=6, use_rslora=True, target_modules=ATTENTION_MLP,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6, r"^model\.layers\.0\.self_attn\.v_proj": 3, "model.layers.[01].mlp.up_proj": 1},
        alpha_pattern={"o_proj": 3, r"layers\.1\..*\.v_proj": 10}, **LM)),
    "lora_layers": ("llama_gqa_tied", dict(
        r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "down_proj"], exclude_modules=["k_proj"],
        layers_to_transform=[1], layers_pattern="layers", **LM)),
    "lora_regex": ("llama_gqa_tied", dict(r=2, lora_alpha=4, target_modules=r".*\.(0\.self_attn\.[qv]|1\.mlp\.up)_proj", **LM)),
    "dora": ("llama_gqa_tied", dict(r=4, lora_alpha=8, use_dora=True, target_modules=ATTENTION_MLP, **LM)),
    "lora_bias": ("llama_bias", dict(r=2, lora_alpha=4, bias="lora_only", target_modules=["q_proj", "o_proj", "up_proj"], **LM)),
    "lora_bias_all": ("llama_bias", dict(r=2, lora_alpha=4, bias="all", target_modules=["q_proj", "v_proj"], **LM)),
    "lora_bias_term": ("llama_bias", dict(r=2, lora_alpha=4, lora_bias=True, target_modules=["q_proj", "down_proj"], **LM)),
    "modules_to_save": ("llama1", dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "embed_tokens"], **LM)),
    "trainable_tokens": ("llama_gqa_tied", dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], trainable_token_indices={"embed_tokens": "PROBE"}, **LM)),
    "trainable_tokens_untied": ("llama1", dict(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices="PROBE", **LM)),
    "lora_embedding": ("llama_gqa_tied", dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], **LM)),
    "lora_embedding_tied": ("llama_gqa_tied", dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, **LM)),
    "modules_to_save_pair": ("llama_gqa_tied", dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"], **LM)),
    "modules_to_save_tied": ("llama_gqa_tied", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, **LM)),
    "lora_embedding_untied": ("llama1", dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head"], **LM)),
    "gpt2_lora": ("gpt2", dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **LM)),
    "gpt2_dora": ("gpt2", dict(r=2, lora_alpha=4, use_dora=True, target_modules=["c_attn", "attn.c_proj", "c_fc"], fan_in_fan_out=True, **LM)),
    "phi3_lora": ("phi3", dict(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], **LM)),
    "phi3_dora": ("phi3", dict(r=2, lora_alpha=4, use_dora=True, target_modules=["qkv_proj", "gate_up_proj", "down_proj"], **LM)),
    "bert_lora": ("bert", dict(r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")),
    "roberta_lora": ("roberta", dict(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "pissa": ("llama_gqa_tied", dict(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "v_proj", "down_proj"], **LM)),
    "olora": ("llama_gqa_tied", dict(r=4, lora_alpha=6, init_lora_weights="olora", target_modules=["q_proj", "v_proj", "down_proj"], **LM)),
    "gemma2_lora": ("gemma2", dict(r=2, lora_alpha=4, target_modules="all-linear", **LM)),
    "qwen3_lora": ("qwen3", dict(r=2, lora_alpha=4, target_modules="all-linear", **LM)),
    "mistral_lora": ("mistral", dict(r=2, lora_alpha=4, target_modules="all-linear", **LM)),
    "qwen2_dora": ("qwen2", dict(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **LM)),
}


def perturb(model, name):
    """Move every trainable tensor off its initial value."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if not p.requires_grad:
                continue
            noise = randn(f"{name}/{key}", *p.shape)
            if "lora_magnitude" in key:
                p.mul_(1 + 0.15 * noise)
            elif "lora_embedding_A" in key or "lora_embedding_B" in key:
                p.copy_(0.3 * noise)
            elif "lora_B" in key:
                p.add_(0.3 * noise)
            elif "lora_A" in key:
                p.add_(0.05 * noise)
            else:
                p.add_(0.2 * noise)


def save(model, folder, base, save_embedding_layers="auto"):
    """Save with PEFT, without its model card, under a base path that means something on every machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = f"families/{base}"
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def prepare(case):
    """(base name, LoraConfig) of a case, with the probe's own tokens where the case asks for token rows."""
    base, args = CASES[case]
    ids = families.ids_for(base)
    picked = sorted(set(ids.flatten().tolist()))[1::4]

    def fill(value):
        if value == "PROBE":
            return picked
        return {k: fill(v) for k, v in value.items()} if isinstance(value, dict) and "PROBE" in value.values() else value

    return base, LoraConfig(**{k: fill(v) for k, v in args.items()}), ids


def make():
    """Write golden/adapters. `lora_embedding_untied` leaves the frozen embedding matrices out of its file, as a lean export does."""
    fresh(GOLDEN / "adapters")
    for case in CASES:
        base, config, ids = prepare(case)
        folder = fresh(GOLDEN / "adapters" / case)
        expected = {"ids": ids}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            base_logits = families.load(base)(input_ids=ids).logits
            seed_global(f"adapters/{case}")
            model = get_peft_model(families.load(base), config).eval()
            if case in ("pissa", "olora"):
                expected["logits_init"] = model(input_ids=ids).logits
                assert (expected["logits_init"] - base_logits).abs().max() < 2e-5
                expected |= {f"init.{k}": v for k, v in initial_tensors(model).items() if "layers.0.mlp.down_proj" in k}
            perturb(model, f"adapters/{case}")
            expected["logits"] = model(input_ids=ids).logits
            save(model, folder, base, False if case == "lora_embedding_untied" else "auto")
            again = PeftModel.from_pretrained(families.load(base), folder).eval()(input_ids=ids).logits
        gap = (again - expected["logits"]).abs().max().item()
        assert gap < 2e-5, f"{case}: PEFT's own reload differs by {gap}"
        effect = (expected["logits"] - base_logits).abs().mean().item()
        save_tensors(folder / "expected.safetensors", expected)
        print(f"{case:24} mean change {effect:.3f}  reload gap {gap:.1e}")


def initial_tensors(model):
    """The adapter's tensors under their names on disk."""
    from peft import get_peft_model_state_dict

    return {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
