"""Shared pieces of the golden-file scripts: dimensions, named random streams, token ids, small writers.

Every random number comes from a generator seeded by a *name*, so adding a case never changes another one.
Everything runs on one CPU thread in float32.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

GOLDEN = Path(__file__).resolve().parent / "golden"
VOCAB, HIDDEN, HEADS, KV_HEADS, FF = 64, 32, 4, 2, 64
SMALL_VOCAB = 48
SHORT, LONG = 12, 48


def generator(name: str) -> torch.Generator:
    """A generator whose stream depends only on `name`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    return torch.Generator().manual_seed(seed)


def seed_global(name: str) -> None:
    """Seed torch's global generator (the one PEFT initialises from) by name."""
    torch.manual_seed(generator(name).initial_seed())


def randn(name: str, *shape: int) -> torch.Tensor:
    """Standard normal tensor of the stream `name`."""
    return torch.randn(*shape, generator=generator(name))


def token_ids(name: str, batch: int, length: int, vocab: int = VOCAB) -> torch.Tensor:
    """Token ids [batch, length] in [3, vocab): the low ids stay free for padding and specials."""
    return torch.randint(3, vocab, (batch, length), generator=generator(name))


def save_tensors(path: Path, tensors: dict) -> None:
    """Write a safetensors file with its names sorted and its tensors contiguous."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: tensors[k].detach().contiguous().clone() for k in sorted(tensors)}, path, {"format": "pt"})


def save_json(path: Path, value) -> None:
    """Write JSON, one line per top-level key (or compact where the value is not an object)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, dict):
        lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
        path.write_text("{\n" + lines + "\n}\n")
    else:
        path.write_text(json.dumps(value) + "\n")


def fresh(path: Path) -> Path:
    """An empty folder at `path`."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def randomise(model: torch.nn.Module, name: str) -> None:
    """Give every parameter a value that matters: logits of unit scale, peaked attention, norms and biases off their defaults.

    Matrices get N(0, gain^2 / fan_in); query/key maps a larger gain. Norm weights are 1 + 0.2 n (Gemma's are stored
    as offsets from one: 0.2 n), biases 0.2 n. Tied input embeddings get std 1/sqrt(hidden), untied ones 0.6.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    gemma = model.config.model_type.startswith("gemma")
    kinds = {id(p): type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = randn(f"{name}/{key}", *p.shape)
            kind = kinds[id(p)]
            if p.ndim == 1:
                norm_weight = key.endswith("weight") and not gemma
                p.copy_(0.2 * noise + (1.0 if norm_weight else 0.0))
            elif kind == "Embedding":
                word = key.endswith(("embed_tokens.weight", "wte.weight"))
                p.copy_(noise * (HIDDEN**-0.5 if word and tied else 0.6 if word else 0.3))
            else:
                fan_in = p.shape[0] if kind == "Conv1D" else p.shape[1]
                peaked = any(s in key for s in ("q_proj", "k_proj", "qkv_proj", "c_attn", "query", "key"))
                p.copy_(noise * (1.4 if peaked else 1.0) * fan_in**-0.5)


def manifest() -> dict:
    """File name, size and sha256 of everything under golden/ except the manifest itself."""
    files = sorted(p for p in GOLDEN.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    rows = [
        {"file": p.relative_to(GOLDEN).as_posix(), "bytes": p.stat().st_size,
         "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in files
    ]
    return {"total_bytes": sum(r["bytes"] for r in rows), "files": rows}
