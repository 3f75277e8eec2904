"""Adapters written by PEFT on the golden base models, with the logits PEFT computes.

golden/adapters/<case>/: adapter_config.json and adapter_model.safetensors as PEFT's `save_pretrained` writes them
(base_model_name_or_path replaced by the path below golden/, lists that PEFT keeps as sets sorted), expected.safetensors: ids (the base family's)
and logits. Every trainable tensor is moved off its initial value first, so that each one matters. PiSSA and OLoRA also
store logits_init, the logits right after initialisation (the base's, up to rounding), and the initial A and B of one
site as init.<key>: the product B A is determined, the signs of its factors are not.

Gradients: labels, loss (the model's own mean) and grad.<key>, the gradient of every trained tensor under its key in the
file. bf16: of every map that the adapter changes, called by itself with the base in bf16, bf16.<module>.x (rows, or ids of
a table), bf16.<module>.y, and bf16.<module>.exact, the same from the same weights and rows in f32. refused.txt, where there is one, holds a word of the reason for which we refuse the adapter.
"""

import json
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.pytorch_utils import Conv1D

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
    "lora_gaussian": ("qwen2", dict(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=["q_proj", "up_proj"], **LM)),
    "lora_exclude": ("llama_gqa_tied", dict(r=2, lora_alpha=4, target_modules="all-linear", exclude_modules=r".*\.0\..*_proj", **LM)),
    "lora_one_layer": ("llama_gqa_tied", dict(r=2, lora_alpha=4, target_modules=["v_proj", "gate_proj"], layers_to_transform=0, **LM)),
    "dora_rslora_patterns": ("llama_gqa_tied", dict(
        r=3, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=ATTENTION_MLP, rank_pattern={"q_proj": 1}, alpha_pattern={"up_proj": 9}, **LM)),
    "dora_bias": ("llama_bias", dict(r=2, lora_alpha=4, use_dora=True, bias="lora_only", target_modules=["q_proj", "o_proj"], **LM)),
    "gpt2_bias": ("gpt2", dict(r=2, lora_alpha=4, bias="lora_only", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **LM)),
    "gpt2_bias_all": ("gpt2", dict(r=2, lora_alpha=4, bias="all", target_modules=["c_attn"], fan_in_fan_out=True, **LM)),
    "gpt2_embedding_rslora": ("gpt2", dict(r=3, lora_alpha=4, use_rslora=True, target_modules=["wte", "c_attn"], fan_in_fan_out=True, **LM)),
    "modules_to_save_norm": ("llama1", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["norm", "down_proj"], **LM)),
    "trainable_tokens_head": ("llama1", dict(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": "PROBE", "lm_head": "PROBE"}, **LM)),
    "bert_dora": ("bert", dict(r=2, lora_alpha=4, use_dora=True, target_modules=["query", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS")),
    "roberta_bias_all": ("roberta", dict(r=2, lora_alpha=4, bias="all", target_modules=["query", "value"], task_type="SEQ_CLS")),
    "dora_embedding": ("llama1", dict(r=2, lora_alpha=4, use_dora=True, target_modules=["embed_tokens", "q_proj"], **LM)),
    "lora_replication": ("llama1", dict(r=2, lora_alpha=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], **LM)),
    "qwen2_dora": ("qwen2", dict(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **LM)),
}

# Cases that Espalier refuses, and a word of the reason: they are kept so that they are not read halfway one day.
REFUSED = {
    "lora_bias_term": "lora_bias",
    "dora_embedding": "embed_tokens",
    "lora_replication": "layer_replication",
    "trainable_tokens_head": "lm_head",
    # PEFT writes the biases of a module saved whole three times then, once under the adapter's name.
    "roberta_bias_all": "classifier.original_module.dense.bias",
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


def labels_for(model, ids):
    """Next tokens, the first four of the first row left out; or a class a row."""
    if model.config.architectures and model.config.architectures[0].endswith("ForSequenceClassification"):
        return torch.tensor([1, 0])
    labels = ids.clone()
    labels[0, :4] = -100
    return labels


def gradients(model, ids):
    """labels, loss, and the gradient of every trained tensor under its key in the file."""
    labels = labels_for(model.get_base_model(), ids)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {n: p.data for n, p in trained.items()}
    totals = {}
    for name, p in trained.items():
        assert p.grad is not None, f"{name} has no gradient"
        # A tied head has parameters of its own over the table's memory, turned: what is shared moves by the sum.
        twins = [o for o in trained.values() if o is not p and o.data_ptr() == p.data_ptr()]
        totals[name] = sum((o.grad.t() for o in twins), p.grad).contiguous()
    for name, p in trained.items():
        p.data = totals[name]
    places = {p.data_ptr() for p in trained.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model)
    found = {f"grad.{k}": v.clone() for k, v in state.items() if v.data_ptr() in places}
    for name, p in trained.items():
        p.data, p.grad = values[name], None
    assert len(found) >= len(trained), f"{len(found)} of {len(trained)} gradients have a key"
    return {"labels": labels, "loss": loss.detach().reshape(1)} | found


def changed_maps(model):
    """(path in the base's naming, module) of every linear map or table that the adapter changes; a tied head is its table."""
    base, inside = model.get_base_model(), []
    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    for path, module in base.named_modules():
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        tuned = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if not tuned and not (isinstance(module, kinds) and any(p.requires_grad for p in module.parameters())):
            continue
        inside.append(path)
        if path.endswith("lm_head") and getattr(base.config, "tie_word_embeddings", False):
            continue
        saved = module.modules_to_save["default"] if hasattr(module, "modules_to_save") else None
        if saved is None or isinstance(saved, kinds):
            yield path, module
        else:
            yield from ((f"{path}.{name}".rstrip("."), m) for name, m in saved.named_modules() if isinstance(m, kinds))


@torch.no_grad()
def in_bf16(case, base, folder, ids):
    """What each changed map gives for a few rows: the base in bf16 with the adapter as PEFT loads it then, and the same weights
    and rows in f32."""
    def loaded(model):
        return dict(changed_maps(PeftModel.from_pretrained(model, folder, is_trainable=True).eval()))

    rounded = families.load(base).to(torch.bfloat16)
    exact = loaded(families.load(base).to(torch.bfloat16).to(torch.float32))
    out = {}
    for path, module in loaded(rounded).items():
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else getattr(module, "original_module", module)
        if isinstance(inner, torch.nn.Embedding):
            x = x_exact = ids[0, :5]
        else:
            width = inner.weight.shape[0 if isinstance(inner, Conv1D) else 1]
            x = randn(f"adapters/{case}/bf16/{path}", 3, width).to(torch.bfloat16)
            x_exact = x.float()
        out |= {f"bf16.{path}.x": x, f"bf16.{path}.y": module(x), f"bf16.{path}.exact": exact[path](x_exact)}
    assert out, f"{case}: nothing is changed"
    return out


def make():
    """Write the cases into golden/adapters. `lora_embedding_untied` leaves the frozen embedding matrices out of its file, as a lean export does."""
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
        expected |= gradients(model, ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected |= in_bf16(case, base, folder, ids)
        gap = (again - expected["logits"]).abs().max().item()
        assert gap < 2e-5, f"{case}: PEFT's own reload differs by {gap}"
        effect = (expected["logits"] - base_logits).abs().mean().item()
        save_tensors(folder / "expected.safetensors", expected)
        if case in REFUSED:
            (folder / "refused.txt").write_text(REFUSED[case] + "\n")
        print(f"{case:24} mean change {effect:.3f}  reload gap {gap:.1e}")


def initial_tensors(model):
    """The adapter's tensors under their names on disk."""
    return {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
