"""Adapters of PEFT's methods that are no weight change of a linear map, and AdaLoRA, with the logits PEFT computes.

golden/adapters/<case>/ as `adapters.py` describes it; that part empties the folder, so make this one after it. Cases of classifiers
hold the scores of their labels. Rows that end in padding are in ids_pad, mask_pad and logits_pad, and a greedy continuation of the
first row in generated, where the case has them; what makes virtual tokens in training is in encoder.<name>.
"""

import types
import warnings

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel, RankAllocator

import adapters
import families
from common import GOLDEN, fresh, randn, save_tensors, seed_global

LM = dict(task_type="CAUSAL_LM")
CLS = dict(task_type="SEQ_CLS")

# case: (base, config class, its arguments, what is stored beside the logits)
CASES = {
    "ln_tuning": ("llama_gqa_tied", peft.LNTuningConfig, LM, ()),
    "gpt2_ln_tuning": ("gpt2", peft.LNTuningConfig, LM, ()),
    "qwen3_ln_tuning": ("qwen3", peft.LNTuningConfig, dict(target_modules=["q_norm", "input_layernorm"], **LM), ()),
    "ln_tuning_and_a_head": ("llama1", peft.LNTuningConfig, dict(target_modules=["norm", "lm_head"], **LM), ()),
    "bert_ln_tuning": ("bert", peft.LNTuningConfig, dict(target_modules=["LayerNorm"], **CLS), ()),
    "tokens_alone": ("llama_gqa_tied", peft.TrainableTokensConfig, dict(token_indices="PROBE", **LM), ()),
    "tokens_alone_untied": ("llama1", peft.TrainableTokensConfig, dict(token_indices="PROBE", **LM), ()),
    "gpt2_tokens_alone": ("gpt2", peft.TrainableTokensConfig, dict(token_indices="PROBE", **LM), ()),
    "bert_tokens_alone": ("bert", peft.TrainableTokensConfig, dict(token_indices="PROBE", **CLS), ()),
    "adalora": ("llama_gqa_tied", peft.AdaLoraConfig, dict(init_r=4, lora_alpha=6, total_step=10, target_modules="all-linear", **LM), ()),
    "adalora_pruned": ("llama_gqa_tied", peft.AdaLoraConfig, dict(
        init_r=3, target_r=1, lora_alpha=5, tinit=1, tfinal=2, deltaT=2, total_step=10, target_modules=["q_proj", "v_proj", "down_proj"], **LM), ("pruned",)),
    "gpt2_adalora": ("gpt2", peft.AdaLoraConfig, dict(init_r=3, lora_alpha=0, total_step=10, target_modules=["c_attn", "c_fc"], **LM), ()),
    "prompt_tuning": ("llama_gqa_tied", peft.PromptTuningConfig, dict(num_virtual_tokens=3, **LM), ("padded", "generated")),
    "prompt_tuning_vocab": ("qwen3", peft.PromptTuningConfig, dict(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB", **LM), ("padded",)),
    "gpt2_prompt_tuning": ("gpt2", peft.PromptTuningConfig, dict(num_virtual_tokens=4, **LM), ("padded", "generated")),
    "gemma2_prompt_tuning": ("gemma2", peft.PromptTuningConfig, dict(num_virtual_tokens=6, **LM), ("padded", "generated")),
    "mistral_prompt_tuning": ("mistral", peft.PromptTuningConfig, dict(num_virtual_tokens=8, **LM), ("padded", "generated")),
    "bert_prompt_tuning": ("bert", peft.PromptTuningConfig, dict(num_virtual_tokens=3, **CLS), ("padded",)),
    "roberta_prompt_tuning": ("roberta", peft.PromptTuningConfig, dict(num_virtual_tokens=3, **CLS), ("padded",)),
    "prefix_tuning": ("llama_gqa_tied", peft.PrefixTuningConfig, dict(num_virtual_tokens=3, **LM), ("padded", "generated")),
    "prefix_projection": ("llama1", peft.PrefixTuningConfig, dict(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=12, **LM), ("padded", "generated")),
    "gpt2_prefix_tuning": ("gpt2", peft.PrefixTuningConfig, dict(num_virtual_tokens=5, **LM), ("padded", "generated")),
    "qwen3_prefix_tuning": ("qwen3", peft.PrefixTuningConfig, dict(num_virtual_tokens=2, **LM), ("padded",)),
    "gemma2_prefix_tuning": ("gemma2", peft.PrefixTuningConfig, dict(num_virtual_tokens=4, **LM), ("padded",)),
    "mistral_prefix_tuning": ("mistral", peft.PrefixTuningConfig, dict(num_virtual_tokens=7, **LM), ("padded",)),
    "p_tuning": ("llama_gqa_tied", peft.PromptEncoderConfig, dict(num_virtual_tokens=3, encoder_hidden_size=10, **LM), ("padded", "generated")),
    "p_tuning_lstm": ("gpt2", peft.PromptEncoderConfig, dict(
        num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type="LSTM", encoder_num_layers=2, **LM), ("padded",)),
    "bert_p_tuning": ("bert", peft.PromptEncoderConfig, dict(num_virtual_tokens=3, encoder_hidden_size=8, **CLS), ("padded",)),
}


def perturb(model, name):
    """Move every trainable tensor off its initial value."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                noise = randn(f"{name}/{key}", *p.shape)
                if "lora_E" in key:
                    p.copy_(noise)
                else:
                    p.add_(0.2 * noise)


def prune(model):
    """Drop triplets as PEFT's allocator does in the end: none of some layers, all of one."""
    pattern = {}
    for i, (key, p) in enumerate(sorted((k, p) for k, p in model.base_model.model.named_parameters() if "lora_E" in k)):
        kept = [(i * 5 + j * 3) % 4 != 0 and i != 2 for j in range(p.shape[0])]
        p.masked_fill_(~torch.tensor(kept).unsqueeze(1), 0.0)
        pattern[key] = kept
    model.peft_config["default"].rank_pattern = pattern


def scores(model, ids, mask=None):
    """Scores of labels, or of the tokens after `ids`: those after virtual tokens are left out."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, -ids.shape[1]:] if logits.dim() == 3 else logits


def greedy(model, ids, count=8):
    """Tokens chosen by whole passes: with a cache, PEFT's own generation gives virtual tokens' positions to the tokens after them."""
    row = ids
    for _ in range(count):
        row = torch.cat([row, scores(model, row)[:, -1:].argmax(-1)], 1)
    return row[:, ids.shape[1]:]


def allocate():
    """golden/rank_allocator.safetensors: a course of PEFT's allocator over three layers whose values and gradients are drawn."""
    names = [f"layer{i}.lora_{part}.default" for i in range(3) for part in "ABE"]
    shapes = {"A": (4, 6), "B": (5, 4), "E": (4, 1)}
    steps = 14
    parameters = {n: torch.nn.Parameter(torch.zeros(shapes[n.split("lora_")[1][0]])) for n in names}
    config = peft.AdaLoraConfig(init_r=4, target_r=1, tinit=2, tfinal=3, deltaT=2, total_step=steps, beta1=0.85, beta2=0.8)
    model = types.SimpleNamespace(named_parameters=lambda: parameters.items())
    allocator = RankAllocator(model, config, "default")
    whole = types.SimpleNamespace(peft_config={"default": config}, trainable_adapter_name="default", rankallocator=allocator, model=model)
    out = {}
    for step in range(steps):
        for name, p in parameters.items():
            p.data = randn(f"allocator/value/{name}/{step}", *p.shape)
            p.grad = randn(f"allocator/gradient/{name}/{step}", *p.shape)
            key = name.removesuffix(".default")
            out |= {f"value.{step:02}.{key}": p.data.clone(), f"gradient.{step:02}.{key}": p.grad.clone()}
        budget, due = allocator.budget_schedule(step)
        out[f"budget.{step:02}"] = torch.tensor([float(budget), float(due)])
        before, config.rank_pattern = config.rank_pattern, None if step <= steps - 3 else config.rank_pattern
        AdaLoraModel.update_and_allocate(whole, step)
        if config.rank_pattern:
            kept = [config.rank_pattern[f"layer{i}.lora_E.default"] for i in range(3)]
            out[f"masks.{step:02}"] = torch.tensor(kept).float()
            for i in range(3):
                zero = parameters[f"layer{i}.lora_E.default"].data.view(-1) == 0
                assert zero.tolist() == [not k for k in kept[i]]
        else:
            config.rank_pattern = before
    save_tensors(GOLDEN / "rank_allocator.safetensors", out)


def make():
    """Write the cases beside those of `adapters.py`."""
    allocate()
    for case, (base, kind, args, extra) in CASES.items():
        ids = families.ids_for(base)
        picked = sorted(set(ids.flatten().tolist()))[1::4]
        args = {k: picked if v == "PROBE" else v for k, v in args.items()}
        folder = fresh(GOLDEN / "adapters" / case)
        expected = {"ids": ids}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            base_logits = families.load(base)(input_ids=ids).logits
            seed_global(f"prompts/{case}")
            model = get_peft_model(families.load(base), kind(**args)).eval()
            perturb(model, f"prompts/{case}")
            if "pruned" in extra:
                prune(model)
            expected["logits"] = scores(model, ids)
            adapters.save(model, folder, base)
            again = PeftModel.from_pretrained(families.load(base), folder).eval()
            again = scores(again, ids)
            if "padded" in extra:
                mask = torch.ones_like(ids)
                mask[1, -3:] = 0
                expected |= {"ids_pad": ids * mask, "mask_pad": mask, "logits_pad": scores(model, ids * mask, mask)}
            if "generated" in extra:
                expected["generated"] = greedy(model, ids[:1])
        gap = (again - expected["logits"]).abs().max().item()
        assert gap < 2e-5, f"{case}: PEFT's own reload differs by {gap}"
        if hasattr(model, "prompt_encoder") and len(list(model.prompt_encoder.parameters())) > 1:
            expected |= {f"encoder.{k}": v for k, v in model.prompt_encoder["default"].state_dict().items()}
        effect = (expected["logits"] - base_logits).abs().mean().item()
        save_tensors(folder / "expected.safetensors", expected)
        print(f"{case:24} mean change {effect:.3f}  reload gap {gap:.1e}")
