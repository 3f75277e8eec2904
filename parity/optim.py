"""Optimiser goldens: AdamW steps, gradient clipping and learning-rate multipliers as torch and transformers compute them.

golden/optim.safetensors:
  adamw.p0 [5, 7], adamw.grads [10, 5, 7], adamw.params [10, 5, 7] (after each step): lr 1e-2, betas (0.9, 0.95), eps 1e-8, wd 0.1
  adamw_default.*: the same start and gradients with lr 2e-3, betas (0.9, 0.999), eps 1e-8, wd 0.01
  clip.g0 [3, 4], clip.g1 [6]; clip.norm [1]; clip.tight.{g0,g1} (max norm 0.5), clip.loose.{g0,g1} (max norm 100: unchanged)
  sgd.params, sgd_momentum.params, sgd_nesterov.params: the same start and gradients with lr 1e-2; momentum 0.9; weight decay 0.1 without it
  lion.params: lr 1e-3, betas (0.9, 0.99), wd 0.1, from arXiv 2302.06675 algorithm 2 in numpy's f64
  muon.params, muon_tall.params, muon_rms.params: lr 1e-2, wd 0.1, iterated in f32; muon_bf16.params as torch.optim.Muon comes
  lorafa.{a [2, 7], b0 [5, 2]}, lorafa.params [10, 5, 2]: PEFT's LoraFAOptimizer in f32, scale 3, lr 1e-2, eps 1e-8
  schedule.<kind> [20] f64: multiplier of the learning rate at steps 0..19; linear and cosine: warmup 4 of 20;
  constant_warmup: warmup 4; wsd: warmup 4, stable 8, decay 8 (transformers' cosine decay to 0)
"""

from unittest import mock

import peft.optimizers.lorafa as lorafa
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


def moved(start, grads, build):
    """Parameters after each step of the optimiser that `build` makes."""
    p = torch.nn.Parameter(start.clone())
    optimiser = build([p])
    out = []
    for g in grads:
        p.grad = g.clone()
        optimiser.step()
        out.append(p.detach().clone())
    return torch.stack(out)


def muon(start, grads, dtype, **kwargs):
    """Parameters after each step of torch's Muon, whose iteration runs in `dtype`."""
    with mock.patch.object(torch, "bfloat16", dtype):
        return moved(start, grads, lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, **kwargs))


def lion(start, grads, lr, beta1, beta2, decay):
    """Parameters after each step of Lion, as its paper writes it."""
    p, m, out = start.double(), torch.zeros_like(start, dtype=torch.float64), []
    for g in grads.double():
        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (torch.sign(c) + decay * p)
        m = beta2 * m + (1 - beta2) * g
        out.append(p)
    return torch.stack(out).float()


def lora_fa(a, start, grads, scale):
    """B after each step of PEFT's LoRA-FA optimiser, multiplying in f32."""
    b = torch.nn.Parameter(start.clone())
    a = torch.nn.Parameter(a.clone(), requires_grad=False)
    group = {"params": [a, b], "names": ["x.lora_A.weight", "x.lora_B.weight"], "scaling_factors": [scale, scale]}
    optimiser = lorafa.LoraFAOptimizer([group], lr=1e-2, eps=1e-8)
    out = []
    with mock.patch.object(lorafa, "is_bf16_available", lambda: False):
        for g in grads:
            b.grad = g.clone()
            optimiser.step()
            out.append(b.detach().clone())
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
    sgd = lambda **kwargs: moved(start, grads, lambda p: torch.optim.SGD(p, lr=1e-2, **kwargs))
    a, b0, b_grads = randn("optim/a", 2, 7), randn("optim/b0", 5, 2), randn("optim/b_grads", 10, 5, 2)
    norm, tight = clipped(g0, g1, 0.5)
    _, loose = clipped(g0, g1, 100.0)
    out = {
        "adamw.p0": start, "adamw.grads": grads, "adamw.params": adamw(start, grads, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
        "adamw_default.params": adamw(start, grads, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
        "sgd.params": sgd(weight_decay=0.1), "sgd_momentum.params": sgd(momentum=0.9),
        "sgd_nesterov.params": sgd(momentum=0.9, nesterov=True), "lion.params": lion(start, grads, 1e-3, 0.9, 0.99, 0.1),
        "muon.params": muon(start, grads, torch.float32), "muon_bf16.params": muon(start, grads, torch.bfloat16),
        "muon_tall.params": muon(start.T.contiguous(), grads.transpose(1, 2).contiguous(), torch.float32),
        "muon_rms.params": muon(start, grads, torch.float32, adjust_lr_fn="match_rms_adamw"),
        "lorafa.a": a, "lorafa.b0": b0, "lorafa.grads": b_grads, "lorafa.params": lora_fa(a, b0, b_grads, 3.0),
        "clip.g0": g0, "clip.g1": g1, "clip.norm": norm.reshape(1),
        "clip.tight.g0": tight[0], "clip.tight.g1": tight[1], "clip.loose.g0": loose[0], "clip.loose.g1": loose[1],
        "schedule.linear": multipliers(lambda o: hf.get_linear_schedule_with_warmup(o, 4, 20)),
        "schedule.cosine": multipliers(lambda o: hf.get_cosine_schedule_with_warmup(o, 4, 20)),
        "schedule.constant_warmup": multipliers(lambda o: hf.get_constant_schedule_with_warmup(o, 4)),
        "schedule.wsd": multipliers(lambda o: hf.get_wsd_schedule(o, num_warmup_steps=4, num_decay_steps=8, num_stable_steps=8)),
    }
    save_tensors(GOLDEN / "optim.safetensors", out)
