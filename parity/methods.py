"""Adapters of PEFT's other methods on the golden base models, with the logits and gradients PEFT computes.

golden/adapters/<case>/: files as in adapters.py; expected.safetensors: ids [2, 12], logits, and grad.<key> for every trainable
tensor, of the loss mean(logits^2) / 2. Every trainable tensor is moved off its initial value first. PEFT's own merge must give the
same logits, and so must its own reload.

BOFT with more than one factor needs a CUDA extension in PEFT, without which PEFT sets the factors to one; its block_diag is put in
place of that kernel here, so that the rest of PEFT's code runs as it is.
"""

import json
import warnings

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.boft import layer as boft

import families
from adapters import ATTENTION_MLP, save
from common import GOLDEN, fresh, randn, save_tensors, seed_global

LM = dict(task_type="CAUSAL_LM")
TIED, BIAS, GPT2 = "llama_gqa_tied", "llama_bias", "gpt2"

# case: (base, configuration class, arguments)
CASES = {
    "ia3": (BIAS, "IA3Config", dict(target_modules=["k_proj", "v_proj", "o_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_regex": (GPT2, "IA3Config", dict(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=r".*\.1\.mlp\.c_proj", fan_in_fan_out=True)),
    "loha": (TIED, "LoHaConfig", dict(
        r=2, alpha=3, rank_pattern={"0.mlp.up_proj": 6}, alpha_pattern={"q_proj": 5}, target_modules=["q_proj", "v_proj", "up_proj"])),
    "lokr": (TIED, "LoKrConfig", dict(r=2, alpha=3, target_modules=["q_proj", "v_proj", "down_proj"])),
    "lokr_both": (TIED, "LoKrConfig", dict(
        r=2, alpha=4, decompose_both=True, decompose_factor=8, rank_pattern={"k_proj": 40}, target_modules=["q_proj", "k_proj", "up_proj"])),
    "hra": (BIAS, "HRAConfig", dict(r=4, target_modules=["q_proj", "down_proj"])),
    "hra_gs": (TIED, "HRAConfig", dict(r=3, apply_GS=True, target_modules=["q_proj", "down_proj"])),
    "oft": (BIAS, "OFTConfig", dict(oft_block_size=8, target_modules=["q_proj", "v_proj", "down_proj"])),
    "oft_exact": (TIED, "OFTConfig", dict(r=5, oft_block_size=0, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"])),
    "oft_shared": (TIED, "OFTConfig", dict(
        oft_block_size=5, coft=True, eps=0.5, block_share=True, num_cayley_neumann_terms=3, target_modules=["q_proj", "down_proj"])),
    "fourierft": (TIED, "FourierFTConfig", dict(
        n_frequency=10, scaling=40.0, random_loc_seed=5, n_frequency_pattern={"down_proj": 400}, target_modules=["q_proj", "v_proj", "down_proj"])),
    "fourierft_turned": (GPT2, "FourierFTConfig", dict(n_frequency=12, scaling=60.0, fan_in_fan_out=True, target_modules=["c_attn", "mlp.c_proj"])),
    "vblora": (TIED, "VBLoRAConfig", dict(
        r=3, num_vectors=7, vector_length=8, topk=2, init_vector_bank_bound=0.3, target_modules=["q_proj", "v_proj", "down_proj"])),
    "boft": (BIAS, "BOFTConfig", dict(boft_block_size=4, target_modules=["q_proj", "v_proj", "down_proj"])),
    "boft_factors": (TIED, "BOFTConfig", dict(
        boft_block_size=0, boft_block_num=8, boft_n_butterfly_factor=3, target_modules=["q_proj"])),
    "vera": (TIED, "VeraConfig", dict(r=6, projection_prng_key=3, target_modules=ATTENTION_MLP)),
    "vera_seed": (TIED, "VeraConfig", dict(r=5, projection_prng_key=11, save_projection=False, d_initial=0.4, target_modules=["q_proj", "v_proj"])),
}
# Noise on the trainable tensors, where the usual one is too little or too much.
NOISE = {"loha": 0.6, "lokr": 0.5, "lokr_both": 0.5, "vblora_logits": 1.0, "vera": 0.5, "hra": 0.1}


SINGLE = boft.get_fbd_cuda, boft.FastBlockDiag.apply


def with_factors(several):
    """BOFT's block-diagonal kernel as torch operations where there are several factors, else as PEFT has it."""
    boft.get_fbd_cuda, boft.FastBlockDiag.apply = SINGLE
    if several:
        boft.get_fbd_cuda = lambda: True
        boft.FastBlockDiag.apply = lambda blocks: torch.stack([torch.block_diag(*group) for group in blocks])


def perturb(model, case):
    """Move every trainable tensor off its initial value."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                scale = next((s for part, s in NOISE.items() if part in key or part == case), 0.2)
                p.add_(scale * randn(f"methods/{case}/{key}", *p.shape))


def gradients(model, ids):
    """Gradients of mean(logits^2) / 2 by the names of tensors on disk."""
    (model(input_ids=ids).logits.square().mean() / 2).backward()
    found = {k.replace(".default", ""): p.grad for k, p in model.named_parameters() if p.requires_grad}
    return {f"grad.{k}": g for k, g in found.items()}


def sorted_lists(folder):
    """Sort the lists that PEFT keeps as sets."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config.get("feedforward_modules"), list):
        config["feedforward_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(only=None):
    """Write the cases into golden/adapters."""
    for case in only or CASES:
        base, kind, args = CASES[case]
        with_factors("boft_n_butterfly_factor" in args)
        folder = fresh(GOLDEN / "adapters" / case)
        ids = families.ids_for(base)[:2, :12].contiguous()
        config = lambda: getattr(peft, kind)(**args, **LM)  # noqa: E731
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base_logits = families.load(base)(input_ids=ids).logits.detach()
            seed_global(f"methods/{case}")
            model = get_peft_model(families.load(base), config()).eval()
            perturb(model, case)
            # PEFT scales shared OFT values down to the limit as they are stored; ours is a part of the function.
            expected = {"ids": ids} | ({} if case == "oft_shared" else gradients(model, ids))
            with torch.no_grad():
                expected["logits"] = model(input_ids=ids).logits
                save(model, folder, base)
                sorted_lists(folder)
                again = PeftModel.from_pretrained(families.load(base), folder).eval()(input_ids=ids).logits
                merged = model.merge_and_unload()(input_ids=ids).logits
        for what, logits in (("reload", again), ("merge", merged)):
            gap = (logits - expected["logits"]).abs().max().item()
            assert gap < 5e-5, f"{case}: PEFT's own {what} differs by {gap}"
        effect = (expected["logits"] - base_logits).abs().mean().item()
        assert effect > 0.02, f"{case}: changes the logits by {effect} alone"
        save_tensors(folder / "expected.safetensors", expected)
        size = sum(p.stat().st_size for p in folder.iterdir())
        print(f"{case:24} mean change {effect:.3f}  merge gap {gap:.1e}  {size} bytes")
