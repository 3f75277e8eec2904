"""Adapters as tools of different ages write them, with the logits each tool computes: museum/<tool>-<version>/<case>/.

    python museum.py PART        with the Python of an environment that has the tool; README.md names the versions

Each case has the tool's files, exhibit.json (base; how it was made; `must_load`: whether we promise to read it; `file` where
the adapter is one file; `alpha` where the file holds none and one must be given; `reason`: a word of the reason for which we
refuse it) and, where the tool runs here, expected.safetensors (ids and logits). Every tensor is moved off its start first.
Parts: peft (any version), unsloth, llamafactory (their settings through PEFT), mlx, loralib, gguf, diffusers, layouts (names
only: image models).
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

from common import GOLDEN, fresh, randn, save_json, save_tensors, seed_global, token_ids, torch

warnings.simplefilter("ignore")
MUSEUM = GOLDEN.parent / "museum"
FAMILY = GOLDEN / "families"


def old_folder(base):
    """The golden base under the keys of transformers 4, which every version reads."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text((FAMILY / base / "config.v4.json").read_text())
    (folder / "model.safetensors").symlink_to(FAMILY / base / "model.safetensors")
    return folder


def load_old(base):
    """The golden base in f32."""
    import transformers as hf

    return hf.AutoModelForCausalLM.from_pretrained(old_folder(base), torch_dtype=torch.float32).float().eval()


def ids_of(base):
    """The probe of a base: that of its golden files."""
    vocab = json.loads((FAMILY / base / "config.json").read_text())["vocab_size"]
    return token_ids(f"families/{base}/ids", 2, 12, vocab)


def exhibit(folder, base, how, must_load=True, **more):
    """What is known of a case."""
    save_json(folder / "exhibit.json", dict(base=f"families/{base}", how=how, must_load=must_load, **more))


def move(model, name):
    """Every trainable tensor off its start."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                noise = randn(f"museum/{name}/{key}", *p.shape)
                p.copy_(p * (1 + 0.15 * noise) if "magnitude" in key else p + 0.2 * noise)


LM = dict(task_type="CAUSAL_LM")
LORA = dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **LM)
GPT2 = dict(r=4, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, **LM)

# The first version that has what a case needs; older ones take a word they do not know for the default.
SINCE = {"patterns": (0, 6), "rslora": (0, 7), "dora": (0, 9), "layer_replication": (0, 10), "pissa": (0, 11), "pissa_niter": (0, 11), "olora": (0, 12),
    "trainable_tokens": (0, 15)}
# case: (base, settings of LoraConfig, promised)
PEFT_LORA = {
    "lora": ("llama1", LORA, True),
    "lora_one_layer": ("llama1", LORA | dict(layers_to_transform=[1], layers_pattern="layers"), True),
    "lora_regex": ("llama1", LORA | dict(target_modules=r".*\.(up|down)_proj"), True),
    "gpt2_bias": ("gpt2", GPT2 | dict(bias="lora_only"), True),
    "embedding": ("llama1", LORA | dict(target_modules=["embed_tokens", "q_proj"]), True),
    "modules_to_save": ("llama1", LORA | dict(modules_to_save=["lm_head"]), True),
    "patterns": ("llama1", LORA | dict(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}), True),
    "rslora": ("llama1", LORA | dict(use_rslora=True), True),
    "dora": ("llama1", LORA | dict(use_dora=True), True),
    "olora": ("llama1", LORA | dict(init_lora_weights="olora"), True),
    "pissa": ("llama1", LORA | dict(init_lora_weights="pissa"), True),
    "trainable_tokens": ("llama1", LORA | dict(trainable_token_indices=[5, 9, 20]), True),
    "pissa_niter": ("llama1", LORA | dict(init_lora_weights="pissa_niter_4"), False),
    "layer_replication": ("llama1", LORA | dict(layer_replication=[[0, 2], [1, 2]]), False),
}
# case: (class of settings, settings): other methods of PEFT, which we may refuse.
PEFT_OTHER = {
    "ia3": ("IA3Config", dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **LM)),
    "adalora": ("AdaLoraConfig", dict(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj"], **LM)),
    "loha": ("LoHaConfig", dict(r=2, alpha=4, target_modules=["q_proj"], **LM)),
    "lokr": ("LoKrConfig", dict(r=2, alpha=4, target_modules=["q_proj"], **LM)),
    "oft": ("OFTConfig", dict(r=2, oft_block_size=0, target_modules=["q_proj"], **LM)),
    "vera": ("VeraConfig", dict(r=4, target_modules=["q_proj"], **LM)),
    "boft": ("BOFTConfig", dict(boft_block_size=4, target_modules=["q_proj"], **LM)),
    "hra": ("HRAConfig", dict(r=2, target_modules=["q_proj"], **LM)),
    "fourierft": ("FourierFTConfig", dict(n_frequency=20, target_modules=["q_proj"], **LM)),
    "prompt_tuning": ("PromptTuningConfig", dict(num_virtual_tokens=3, **LM)),
}


def save_peft(model, folder, base, **how):
    """PEFT's own files, under a base path that means something on every machine."""
    model.save_pretrained(folder, **how)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = f"families/{base}"
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def peft_case(tool, case, base, config, promised, how, dtype=None, edit=None, reason=None, **saving):
    """One case through PEFT: made, moved, run, saved."""
    import peft

    folder, ids = MUSEUM / tool / case, ids_of(base)
    seed_global(f"museum/{case}")
    model = peft.get_peft_model(load_old(base), config).eval()
    move(model, case)
    if dtype is not None:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(p.to(dtype).float())
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        plain = load_old(base)(input_ids=ids).logits
    assert logits.shape != plain.shape or (logits - plain).abs().max() > 1e-3, f"{case}: nothing changes"
    fresh(folder)
    if dtype is not None:
        for p in model.parameters():
            p.data = p.data.to(dtype) if p.requires_grad else p.data
    save_peft(model, folder, base, **saving)
    if edit:
        edit(folder)
    if getattr(config, "bias", "none") != "none":
        from safetensors import safe_open

        with safe_open(folder / "adapter_model.safetensors", "pt") as f:
            if not any(key.endswith("bias") for key in f.keys()):
                promised, reason, how = False, ".bias", f"{how}; this version does not save the biases that it trains"
    save_tensors(folder / "expected.safetensors", {"ids": ids, "logits": logits})
    exhibit(folder, base, how, promised, **({"reason": reason} if reason else {}))
    print(tool, case)


def part_peft():
    """Every case that this version of PEFT has."""
    import peft
    import transformers

    tool = f"peft-{peft.__version__}"
    fresh(MUSEUM / tool)
    how = f"written by peft {peft.__version__} with transformers {transformers.__version__}"

    def safe(name, base, make, promised, **more):
        try:
            config = make()
        except (TypeError, AttributeError, ValueError) as e:
            print(f"{tool} has no {name}: {str(e)[:70]}")
            return
        peft_case(tool, name, base, config, promised, how, safe_serialization=True, **more)

    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    for name, (base, settings, promised) in PEFT_LORA.items():
        if version < SINCE.get(name, (0, 0)):
            continue
        safe(name, base, lambda s=settings: peft.LoraConfig(**s), promised)
    safe("lora_bf16", "llama1", lambda: peft.LoraConfig(**LORA), True, dtype=torch.bfloat16)
    safe("lora_f16", "llama1", lambda: peft.LoraConfig(**LORA), True, dtype=torch.float16)
    if version < (0, 5):
        # The default then: a pickle.
        peft_case(tool, "pickle", "llama1", peft.LoraConfig(**LORA), False, how, reason="pickle")
    for name, (kind, settings) in PEFT_OTHER.items() if version in ((0, 4), (0, 17)) else ():
        try:
            safe(name, "llama1", lambda k=kind, s=settings: getattr(peft, k)(**s), False)
        except Exception as e:  # noqa: BLE001: what this version cannot do with this torch is no exhibit
            print(f"{tool}: {name} does not run: {type(e).__name__} {str(e)[:80]}")
            import shutil

            shutil.rmtree(MUSEUM / tool / name, ignore_errors=True)


def set_keys(**keys):
    """Writes keys into a case's settings, as another tool that saves through PEFT leaves them."""
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys, indent=2))
    return edit


def part_unsloth():
    """Unsloth saves through PEFT; its settings have a class and a mark of its own, and expressions for targets."""
    import peft

    tool = f"unsloth-peft-{peft.__version__}"
    fresh(MUSEUM / tool)
    how = f"peft {peft.__version__} with the settings that Unsloth's get_peft_model passes and the marks it leaves"
    mark = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True}
    all_seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    llama = LORA | dict(target_modules=all_seven, lora_dropout=0, bias="none")
    peft_case(tool, "language", "llama1", peft.LoraConfig(**llama), True, how, edit=set_keys(auto_mapping=mark))
    expression = (r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
        r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))")
    peft_case(tool, "vision_expression", "llama1", peft.LoraConfig(**llama | dict(target_modules=expression)), True, how, edit=set_keys(auto_mapping=mark))
    whole = llama | dict(modules_to_save=["embed_tokens", "lm_head"], use_rslora=True)
    peft_case(tool, "continued_pretraining", "llama1", peft.LoraConfig(**whole), True, how, edit=set_keys(auto_mapping=mark, task_type="CAUSAL_LM"))


def part_llamafactory():
    """LLaMA-Factory saves through PEFT: all linear maps by name, `additional_target` as modules saved whole."""
    import peft

    tool = f"llamafactory-peft-{peft.__version__}"
    fresh(MUSEUM / tool)
    how = f"peft {peft.__version__} with the settings that LLaMA-Factory's init_adapter passes"
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    args = dict(task_type="CAUSAL_LM", inference_mode=False, r=4, target_modules=names, lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False)
    cases = {
        "lora_all": ("llama1", args),
        "additional_target": ("llama1", args | dict(modules_to_save=["embed_tokens", "lm_head"])),
        "additional_target_tied": ("gpt2", args | dict(target_modules=["c_attn", "c_proj"], modules_to_save=["wte"])),
        "pissa": ("llama1", args | dict(init_lora_weights="pissa")),
        "dora_rslora": ("llama1", args | dict(use_rslora=True, use_dora=True)),
    }
    for name, (base, settings) in cases.items():
        peft_case(tool, name, base, peft.LoraConfig(**settings), True, how)


def part_mlx():
    """mlx-lm's own layers, names and settings, on the CPU."""
    import importlib.metadata as metadata

    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    version = metadata.version("mlx-lm")
    tool = f"mlx-lm-{version}"
    fresh(MUSEUM / tool)
    base = "llama1"
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    cases = {
        "lora": ("lora", 2, dict(rank=4, scale=2.0, dropout=0.0)),
        "lora_last_layer": ("lora", 1, dict(rank=4, scale=1.5, dropout=0.0, keys=keys)),
        "dora": ("dora", 2, dict(rank=4, scale=2.0, dropout=0.0, keys=keys)),
        "embedding": ("lora", 1, dict(rank=3, scale=2.0, dropout=0.0, keys=["self_attn.q_proj", "model.embed_tokens"])),
    }
    for name, (kind, layers, parameters) in cases.items():
        folder, ids = fresh(MUSEUM / tool / name), ids_of(base)
        model, _ = load_model(old_folder(base))
        model.freeze()
        linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
        moved = []
        for key, value in tree_flatten(model.trainable_parameters()):
            noise = randn(f"museum/mlx/{name}/{key}", *value.shape).numpy()
            start = np.array(value)
            moved.append((key, mx.array(start * (1 + 0.15 * noise) if key.endswith(".m") else start + 0.2 * noise)))
        model.update(tree_unflatten(moved))
        logits = torch.tensor(np.array(model(mx.array(ids.numpy())).astype(mx.float32)))
        mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        save_config(dict(fine_tune_type=kind, num_layers=layers, lora_parameters=parameters, model=f"families/{base}", batch_size=4, iters=1,
            learning_rate=1e-5, optimizer="adam", seed=0, mask_prompt=False, grad_checkpoint=False, max_seq_length=2048), folder / "adapter_config.json")
        save_tensors(folder / "expected.safetensors", {"ids": ids, "logits": logits})
        exhibit(folder, base, f"mlx-lm {version} (mlx {metadata.version('mlx')}) on the CPU")
        print(tool, name)


def part_loralib():
    """Microsoft's loralib in place of two maps a layer; the file is its `lora_state_dict`, which holds no scaling."""
    import importlib.metadata as metadata

    import loralib
    from safetensors.torch import save_file

    tool, base = f"loralib-{metadata.version('loralib')}", "llama1"
    fresh(MUSEUM / tool)
    folder, ids = fresh(MUSEUM / tool / "lora"), ids_of(base)
    model = load_old(base)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = loralib.Linear(old.in_features, old.out_features, r=4, lora_alpha=16, bias=False)
            new.weight.data.copy_(old.weight)
            setattr(layer.self_attn, name, new)
    loralib.mark_only_lora_as_trainable(model)
    move(model, "loralib")
    model.train(False)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    model.train(True)
    save_file({k: v.contiguous() for k, v in loralib.lora_state_dict(model).items()}, folder / "lora.safetensors")
    save_tensors(folder / "expected.safetensors", {"ids": ids, "logits": logits})
    exhibit(folder, base, f"written by {tool}", file="lora.safetensors", alpha=16)
    print(tool)


def part_diffusers():
    """diffusers' own file of a tiny UNet: an image model, which we refuse."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    tool = f"diffusers-{diffusers.__version__}"
    fresh(MUSEUM / tool)
    folder = fresh(MUSEUM / tool / "unet")
    unet = diffusers.UNet2DConditionModel(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    exhibit(folder, "llama1", f"written by {tool}", must_load=False, file="pytorch_lora_weights.safetensors", reason="image")
    kohya = fresh(MUSEUM / tool / "kohya")
    from diffusers.utils import convert_state_dict_to_kohya

    named = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in layers.items()})
    save_tensors(kohya / "lora.safetensors", {k.replace("unet_", "lora_unet_", 1) if k.startswith("unet_") else k: v for k, v in named.items()})
    exhibit(kohya, "llama1", f"names by {tool}'s converter to kohya's scripts", must_load=False, file="lora.safetensors", reason="image")


def part_gguf():
    """llama.cpp's converter on golden adapters; its folder is the second argument. The logits are PEFT's."""
    import importlib.metadata as metadata
    import subprocess

    from safetensors.torch import load_file

    llama_cpp, version = Path(sys.argv[2]), sys.argv[3]
    tool = f"llama.cpp-of-{version}"
    fresh(MUSEUM / tool)
    for case, base in {"lora_regex": "llama_gqa_tied", "qwen3_lora": "qwen3", "phi3_lora": "phi3"}.items():
        folder, source = fresh(MUSEUM / tool / case), GOLDEN / "adapters" / case
        out = folder / "adapter.gguf"
        run = [sys.executable, str(llama_cpp / "convert_lora_to_gguf.py"), "--base", str(old_folder(base)), "--outtype", "f32", "--outfile", str(out), str(source)]
        subprocess.run(run, check=True, capture_output=True)
        expected = load_file(source / "expected.safetensors")
        save_tensors(folder / "expected.safetensors", {"ids": expected["ids"], "logits": expected["logits"]})
        exhibit(folder, base, f"convert_lora_to_gguf.py as shipped with {version}, gguf {metadata.version('gguf')}", file="adapter.gguf")
        print(tool, case)


# Names of tensors as other tools write them, after the readers in diffusers' lora_conversion_utils.
LAYOUTS = {
    "xlabs": {f"double_blocks.0.processor.{p}.{d}.weight": (2, 8) for p in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2") for d in ("down", "up")},
    "comfyui": {f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{d}.weight": (2, 8) for d in ("A", "B")},
    "comfyui_down_up": {f"diffusion_model.blocks.0.self_attn.q.lora_{d}.weight": (2, 8) for d in ("down", "up")},
    "musubi": {f"lora_unet_blocks_0_self_attn_q.lora_{d}.weight": (2, 8) for d in ("down", "up")} | {"lora_unet_blocks_0_self_attn_q.alpha": (1,)},
    "kohya_text": {f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{d}.weight": (2, 8) for d in ("down", "up")},
    "diffusers_old_unet": {f"unet.down_blocks.0.attentions.0.processor.to_q_lora.{d}.weight": (2, 8) for d in ("down", "up")},
    "diffusers_transformer": {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{d}.weight": (2, 8) for d in ("A", "B")},
    "cloneofsimo": {f"unet:0:{d}": (2, 8) for d in ("down", "up")},
    "lycoris_lokr": {f"lycoris_blocks_0_self_attn_q.lokr_{d}": (2, 2) for d in ("w1", "w2")},
}


def part_layouts():
    """Files of image models by their names alone."""
    fresh(MUSEUM / "image-layouts")
    for name, tensors in LAYOUTS.items():
        folder = fresh(MUSEUM / "image-layouts" / name)
        save_tensors(folder / "lora.safetensors", {k: randn(f"museum/{name}/{k}", *shape) for k, shape in tensors.items()})
        exhibit(folder, "llama1", "names after the readers of diffusers' lora_conversion_utils", must_load=False, file="lora.safetensors", reason="image")


if __name__ == "__main__":
    globals()[f"part_{sys.argv[1]}"]()
