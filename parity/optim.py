"""Optimiser goldens: AdamW steps, gradient clipping and learning-rate multipliers as torch and transformers compute them.

golden/optim.safetensors:
  adamw.p0 [5, 7], adamw.grads [10, 5, 7], adamw.params [10, 5, 7] (after each step): lr 1e-2, betas (0.9, 0.95), eps 1e-8, wd 0.1
  adamw_default.*: the same start and gradients with lr 2e-3, betas (0.9, 0.999), eps 1e-8, wd 0.01
  clip.g0 [3, 4], clip.g1 [6]; clip.norm [1]; clip.tight.{g0,g1} (max norm 0.5), clip.loose.{g0,g1} (max norm 100: unchanged)
  schedule.<kind> [20] f64: multiplier of the learning rate at steps 0..19; linear and cosine: warmup 4 of 20;
  constant_warmup: warmup 4; wsd: warmup 4, stable 8, decay 8 (transformers' cosine decay to 0)
"""

import torch
import transformers as hf

from common import GOLDEN, randn, save_tensors


def adamw(start, grads, **kwargs):
    """Parameters after each step."""
    p = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.AdamW([p], foreach=False, fused=False, **kwargs)
    out = []
    for g in grads:
        p.grad = g.clone()
        optimiser.step()
        out.append(p.detach().clone())
    return torch.stack(out)


def clipped(g0, g1, max_norm):
    """(total norm, clipped gradients)."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in (g0, g1)]
    for p, g in zip(params, (g0, g1)):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    return norm, [p.grad for p in params]


def multipliers(build):
    """Learning-rate multiplier at each of 20 steps."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimiser)
    out = []
    for _ in range(20):
        out.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return torch.tensor(out, dtype=torch.float64)


def make():
    """Write golden/optim.safetensors."""
    start, grads = randn("optim/p0", 5, 7), randn("optim/grads", 10, 5, 7)
    grads[3] *= 1e-4
    grads[:, 0, 0] = 0.0
    g0, g1 = randn("optim/g0", 3, 4), randn("optim/g1", 6)
    norm, tight = clipped(g0, g1, 0.5)
    _, loose = clipped(g0, g1, 100.0)
    out = {
        "adamw.p0": start, "adamw.grads": grads, "adamw.params": adamw(start, grads, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
        "adamw_default.params": adamw(start, grads, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
        "clip.g0": g0, "clip.g1": g1, "clip.norm": norm.reshape(1),
        "clip.tight.g0": tight[0], "clip.tight.g1": tight[1], "clip.loose.g0": loose[0], "clip.loose.g1": loose[1],
        "schedule.linear": multipliers(lambda o: hf.get_linear_schedule_with_warmup(o, 4, 20)),
        "schedule.cosine": multipliers(lambda o: hf.get_cosine_schedule_with_warmup(o, 4, 20)),
        "schedule.constant_warmup": multipliers(lambda o: hf.get_constant_schedule_with_warmup(o, 4)),
        "schedule.wsd": multipliers(lambda o: hf.get_wsd_schedule(o, num_warmup_steps=4, num_decay_steps=8, num_stable_steps=8)),
    }
    save_tensors(GOLDEN / "optim.safetensors", out)
