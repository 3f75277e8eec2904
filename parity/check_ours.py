"""Does PEFT compute our logits from an adapter folder that our tool wrote? Prints one JSON object.

    python check_ours.py --base MODEL_DIR [--adapter ADAPTER_DIR] --ours LOGITS.safetensors [--atol 1e-4]

LOGITS.safetensors holds ids [b, t] i64 (optionally attention_mask [b, t] i64) and logits [b, t, vocab] (or [b, labels])
f32, as `espalier logits` writes them; ids may also come from --ids FILE. Without --adapter the base alone is compared
(a merged export, say). Exit status 0 when the largest absolute difference is at most --atol, else 1.
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
    wanted = set(get_peft_model_state_dict(model))
    return {"unexpected_keys": sorted(on_disk - wanted), "missing_keys": sorted(wanted - on_disk)}


def main():
    """Compare and print."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--base", required=True)
    args.add_argument("--adapter")
    args.add_argument("--ours", required=True)
    args.add_argument("--ids")
    args.add_argument("--atol", type=float, default=1e-4)
    args = args.parse_args()

    ours = load_file(args.ours)
    inputs = {**load_file(args.ids), **ours} if args.ids else ours
    missing = [k for k in ("ids", "logits") if k not in inputs]
    if missing:
        sys.exit(f"{args.ours}: no tensor named {missing[0]!r}; found {sorted(inputs)}")
    model = load_base(args.base)
    out = {"base": args.base, "adapter": args.adapter}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if args.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, args.adapter).eval()
            out |= adapter_report(model, args.adapter)
        call = {"input_ids": inputs["ids"]}
        if "attention_mask" in inputs:
            call["attention_mask"] = inputs["attention_mask"]
        theirs = model(**call).logits.float()
    mine = ours["logits"].float()
    out |= {"shape_theirs": list(theirs.shape), "shape_ours": list(mine.shape)}
    ok = theirs.shape == mine.shape
    if ok:
        gap = (theirs - mine).abs()
        out |= {"max_abs_diff": gap.max().item(), "mean_abs_diff": gap.mean().item(), "logits_std": theirs.std().item()}
        ok = out["max_abs_diff"] <= args.atol
    print(json.dumps(out | {"atol": args.atol, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
