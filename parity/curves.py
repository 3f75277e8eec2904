"""Fifty AdamW steps from a PEFT-initialised adapter: the losses that a trainer must reproduce.

golden/curves/<case>/: init/ and final/ (PEFT adapter folders), data.jsonl (rows {"input_ids", "labels"}, -100 masked),
losses.json (settings, loss before each of 50 steps; learning rates, gradient norms and labelled tokens of each step),
expected.safetensors (ids [2, 12] of the base family, logits of the final adapter).

Rows are taken in file order, cycling; a micro batch is 2 rows, right-padded with id 0, label -100, mask 0. The loss
is the sum of cross entropies of the shifted, labelled tokens of the step divided by their number: with one micro batch
that is the model's own mean loss. Every trainable tensor decays (weight decay 0.01), DoRA's magnitudes included.
AdaLoRA's losses hold its penalty, at its weight; none of its ranks is pruned in these steps.
"""

import json
import warnings

import peft
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import adapters
import families
from common import GOLDEN, fresh, generator, save_tensors, seed_global, token_ids

STEPS, MICRO, ROWS, LENGTH = 50, 2, 12, 16
ADAMW = dict(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
LLAMA = dict(r=2, lora_alpha=4, target_modules=adapters.ATTENTION_MLP, **adapters.LM)
GPT2 = dict(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **adapters.LM)
PHI3 = dict(r=2, lora_alpha=4, target_modules="all-linear", **adapters.LM)

# case: (base, LoraConfig arguments or settings of another method, settings other than the defaults)
CASES = {
    "llama_lora": ("llama_gqa_tied", LLAMA, {}),
    "llama_rslora": ("llama_gqa_tied", LLAMA | dict(use_rslora=True, r=3, rank_pattern={"q_proj": 1}, alpha_pattern={"o_proj": 6}), {}),
    "llama_dora": ("llama_gqa_tied", LLAMA | dict(use_dora=True), {}),
    "llama_lora_padded": ("llama_gqa_tied", LLAMA | dict(target_modules=["q_proj", "v_proj"]), {"unequal": True}),
    "llama_lora_sched": ("llama_gqa_tied", LLAMA,
        {"accumulate": 2, "max_grad_norm": 0.5, "warmup_steps": 4, "schedule": "cosine"}),
    "gpt2_lora": ("gpt2", GPT2, {}),
    "gpt2_dora": ("gpt2", GPT2 | dict(use_dora=True), {}),
    "phi3_lora": ("phi3", PHI3, {}),
    "phi3_dora": ("phi3", PHI3 | dict(use_dora=True), {}),
    "llama_prompt": ("llama_gqa_tied", peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), {"unequal": True, "lr": 2e-2}),
    "gpt2_prefix": ("gpt2", peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {"unequal": True, "lr": 2e-2}),
    "llama_adalora": ("llama_gqa_tied", peft.AdaLoraConfig(
        init_r=3, lora_alpha=6, tinit=STEPS, total_step=2 * STEPS, target_modules=adapters.ATTENTION_MLP, task_type="CAUSAL_LM"), {"lr": 2e-2}),
}


def rows_for(case, unequal):
    """Pre-tokenised rows: a masked prompt of 3 to 6 tokens, every third row with a hole in its trained span."""
    draw = generator(f"curves/{case}/rows")
    rows = []
    for i in range(ROWS):
        length = int(torch.randint(7, LENGTH + 1, (1,), generator=draw)) if unequal else LENGTH
        ids = token_ids(f"curves/{case}/{i}", 1, length)[0].tolist()
        labels = list(ids)
        prompt = int(torch.randint(3, 7, (1,), generator=draw))
        labels[:prompt] = [-100] * prompt
        if i % 3 == 2:
            labels[length - 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows):
    """Right-padded input_ids, attention_mask and labels."""
    width = max(len(r["input_ids"]) for r in rows)

    def pad(values, fill):
        return values + [fill] * (width - len(values))

    return {
        "input_ids": torch.tensor([pad(r["input_ids"], 0) for r in rows]),
        "attention_mask": torch.tensor([pad([1] * len(r["input_ids"]), 0) for r in rows]),
        "labels": torch.tensor([pad(r["labels"], -100) for r in rows]),
    }


def train(model, rows, accumulate=1, max_grad_norm=0.0, warmup_steps=0, schedule="constant", lr=ADAMW["lr"]):
    """Run the steps; per step: loss, learning rate, gradient norm before clipping, labelled tokens."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, **ADAMW | dict(lr=lr))
    if schedule == "cosine":
        scheduler = hf.get_cosine_schedule_with_warmup(optimiser, warmup_steps, STEPS)
    else:
        scheduler = hf.get_constant_schedule(optimiser)
    log = {"losses": [], "learning_rates": [], "grad_norms": [], "tokens": []}
    cursor = 0
    for _ in range(STEPS):
        batches = []
        for _ in range(accumulate):
            batches.append(collate([rows[(cursor + k) % len(rows)] for k in range(MICRO)]))
            cursor += MICRO
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        total = 0.0
        for batch in batches:
            # The model's mean over its own micro batch, reweighted to the labelled tokens of the whole step.
            own = int((batch["labels"][:, 1:] != -100).sum())
            loss = model(**batch).loss * (own / tokens)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm if max_grad_norm > 0 else float("inf"))
        log["losses"].append(total)
        log["learning_rates"].append(optimiser.param_groups[0]["lr"])
        log["grad_norms"].append(norm.item())
        log["tokens"].append(tokens)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
    return log


def make():
    """Write golden/curves."""
    for case, (base, args, settings) in CASES.items():
        settings = dict(settings)
        folder = fresh(GOLDEN / "curves" / case)
        rows = rows_for(case, settings.pop("unequal", False))
        seed_global(f"curves/{case}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(families.load(base), LoraConfig(**args) if isinstance(args, dict) else args)
        adapters.save(model, folder / "init", base)
        (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        log = train(model, rows, **settings)
        adapters.save(model, folder / "final", base)
        ids = families.ids_for(base)
        with torch.no_grad():
            save_tensors(folder / "expected.safetensors", {"ids": ids, "logits": model.eval()(input_ids=ids).logits[:, -ids.shape[1]:]})
        head = dict(base=f"families/{base}", steps=STEPS, batch_size=MICRO, accumulate=settings.get("accumulate", 1), **ADAMW | dict(lr=settings.get("lr", ADAMW["lr"])),
            schedule=settings.get("schedule", "constant"), warmup_steps=settings.get("warmup_steps", 0),
            max_grad_norm=settings.get("max_grad_norm", 0.0))
        body = json.dumps({"settings": head, **log}).replace('], "', '],\n "').replace('}, "', '},\n "')
        (folder / "losses.json").write_text(body + "\n")
        print(f"{case:18} loss {log['losses'][0]:.4f} -> {log['losses'][-1]:.4f}")
