"""Does PEFT compute our logits from an adapter folder that our tool wrote? Prints one JSON object.

    python check_ours.py --base MODEL_DIR [--adapter ADAPTER_DIR] --ours LOGITS.safetensors [--atol 1e-4]

LOGITS.safetensors holds ids [b, t] i64 (optionally attention_mask [b, t] i64) and logits [b, t, vocab] (or [b, labels])
f32, as `espalier logits` writes them; ids may also come from --ids FILE. Without --adapter the base alone is compared
(a merged export, say). Exit status 0 when the largest absolute difference is at most --atol, else 1.

    python check_ours.py --written FOLDER [--atol 1e-4]

does so for every adapter that `cargo run --release -p espalier-models --example written_adapters -- FOLDER` wrote, one line each.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from common import torch
from safetensors import safe_open
from safetensors.torch import load_file


def load_base(folder):
    """The base model in f32 with eager attention, as the class its config names."""
    import transformers as hf

    config = hf.AutoConfig.from_pretrained(folder)
    named = (config.architectures or [""])[0]
    auto = hf.AutoModelForSequenceClassification if named.endswith("ForSequenceClassification") else hf.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def adapter_report(model, folder):
    """Keys of the adapter file that PEFT did not take, and adapter keys of the model the file lacks."""
    from peft import get_peft_model_state_dict

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as f:
        on_disk = set(f.keys())
    # What all modules share is one tensor in our files, which PEFT lists once for each of them.
    shared = {k.removeprefix("base_model.") for k in on_disk if k.count(".") == 1}
    wanted = {k for k in get_peft_model_state_dict(model) if k in on_disk or k.rpartition(".")[2] not in shared}
    return {"unexpected_keys": sorted(on_disk - wanted), "missing_keys": sorted(wanted - on_disk)}


def compare(base, adapter, inputs, atol):
    """PEFT's logits of an adapter against ours, as one JSON object."""
    model = load_base(base)
    out = {"base": str(base), "adapter": adapter and str(adapter)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).eval()
            out |= adapter_report(model, adapter)
        call = {"input_ids": inputs["ids"]}
        if "attention_mask" in inputs:
            call["attention_mask"] = inputs["attention_mask"]
        theirs = model(**call).logits.float()
    mine = inputs["logits"].float()
    out |= {"shape_theirs": list(theirs.shape), "shape_ours": list(mine.shape)}
    ok = theirs.shape == mine.shape and not out.get("unexpected_keys") and not out.get("missing_keys")
    if theirs.shape == mine.shape:
        gap = (theirs - mine).abs()
        out |= {"max_abs_diff": gap.max().item(), "mean_abs_diff": gap.mean().item(), "logits_std": theirs.std().item()}
        ok &= out["max_abs_diff"] <= atol
    return out | {"atol": atol, "ok": ok}


def written(root, atol):
    """Every adapter below `root` as the example `written_adapters` leaves them; True if PEFT computes our logits from all."""
    import methods
    from common import GOLDEN

    counts, worst, refused = {}, {}, {}
    for folder in sorted(p for p in Path(root).iterdir() if (p / "base").is_file()):
        config = json.loads((folder / "adapter_config.json").read_text())
        kind, base = config["peft_type"], (folder / "base").read_text()
        methods.with_factors(config.get("boft_n_butterfly_factor", 1) > 1)
        try:
            found = compare(GOLDEN / base, folder, load_file(folder / "logits.safetensors"), atol)
        except (TypeError, ValueError) as error:
            if "Conv1D" not in str(error):
                raise
            # PEFT has some methods on nn.Linear alone.
            refused[kind] = refused.get(kind, 0) + 1
            continue
        counts[kind] = counts.get(kind, 0) + 1
        worst[kind] = max(worst.get(kind, 0.0), found.get("max_abs_diff", float("inf")))
        if not found["ok"]:
            print(json.dumps(found | {"peft_type": kind}))
            counts["failed"] = counts.get("failed", 0) + 1
    for kind in worst:
        print(f"{kind:10} {counts[kind]:3} adapters, largest difference {worst[kind]:.1e}")
    for kind, count in refused.items():
        print(f"{kind:10} {count:3} adapters that PEFT refuses: their base has Conv1D")
    return "failed" not in counts and bool(counts)


def main():
    """Compare and print."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--base")
    args.add_argument("--adapter")
    args.add_argument("--ours")
    args.add_argument("--ids")
    args.add_argument("--written")
    args.add_argument("--atol", type=float, default=1e-4)
    args = args.parse_args()
    if args.written:
        sys.exit(0 if written(args.written, args.atol) else 1)
    if not (args.base and args.ours):
        sys.exit("name --base and --ours, or --written")

    ours = load_file(args.ours)
    inputs = {**load_file(args.ids), **ours} if args.ids else ours
    missing = [k for k in ("ids", "logits") if k not in inputs]
    if missing:
        sys.exit(f"{args.ours}: no tensor named {missing[0]!r}; found {sorted(inputs)}")
    out = compare(args.base, args.adapter, inputs, args.atol)
    print(json.dumps(out))
    sys.exit(0 if out["ok"] else 1)


if __name__ == "__main__":
    main()
