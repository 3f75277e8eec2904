"""Reference workload: greedy generation with transformers + PEFT, one LoRA adapter beside the base.

Prints one JSON line: tokens/s of prefill and decode. Random weights and tokens, no end-of-text token.

With --adapters N the rows of a batch go through N adapters in turn.

usage: peft_generate.py --batch 1 --prompt 64 --new-tokens 64 [--adapters 1] [--device cpu|cuda] [--dtype float32|bfloat16] [shape flags]
"""
import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

p = argparse.ArgumentParser()
for name, default in dict(hidden=512, layers=8, heads=8, kv_heads=8, ff=1408, vocab=8192, rank=16,
                          batch=1, adapters=1, prompt=64, new_tokens=64, threads=2).items():
    p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
p.add_argument("--device", default="cpu")
p.add_argument("--dtype", default="float32")
a = p.parse_args()

torch.manual_seed(0)
if a.device == "cpu":
    torch.set_num_threads(a.threads)
config = LlamaConfig(hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.heads,
                     num_key_value_heads=a.kv_heads, intermediate_size=a.ff, vocab_size=a.vocab,
                     max_position_embeddings=2048, eos_token_id=None, bos_token_id=None, pad_token_id=0)
model = LlamaForCausalLM(config).to(a.device, getattr(torch, a.dtype))
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
lora = LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules=targets)
model = get_peft_model(model, lora, adapter_name="0")
for i in range(1, a.adapters):
    model.add_adapter(str(i), lora)
by_row = {"adapter_names": [str(row % a.adapters) for row in range(a.batch)]} if a.adapters > 1 else {}
model.eval()
ids = torch.randint(1, a.vocab, (a.batch, a.prompt), device=a.device)


def timed(new_tokens):
    if a.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                       min_new_tokens=new_tokens, do_sample=False, **by_row)
    if a.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


timed(4)
prefill = min(timed(1) for _ in range(3))
whole = min(timed(a.new_tokens) for _ in range(3))
print(json.dumps(dict(tool="peft", torch=torch.__version__, device=a.device, dtype=a.dtype, batch=a.batch, adapters=a.adapters,
                      prompt=a.prompt, new_tokens=a.new_tokens,
                      prefill_tokens_per_s=round(a.batch * a.prompt / prefill, 1),
                      decode_tokens_per_s=round(a.batch * (a.new_tokens - 1) / (whole - prefill), 1))))
