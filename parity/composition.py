"""Two golden adapters acting together in PEFT, and the one file that our tool writes for their weighted sum, read by PEFT.

golden/composition/: adapter_config.json and adapter_model.safetensors as `espalier export` writes them (the base's hash and
settings are in the weights' metadata), expected.safetensors: ids (the base family's), logits (PEFT with both adapters active,
their scalings multiplied by the weights), logits_of_ours (PEFT with our file). The two must agree.

    espalier export --model golden/families/llama_gqa_tied --adapter golden/adapters/lora_all@0.7 \\
        --adapter golden/adapters/rslora_patterns@-0.5 --out golden/composition
    python make_golden.py composition
"""

import torch
from peft import PeftModel
from safetensors.torch import load_file

from check_ours import adapter_report, load_base
from common import GOLDEN, save_tensors

BASE = "llama_gqa_tied"
PARTS = {"lora_all": 0.7, "rslora_patterns": -0.5}


def make():
    """Compute both sets of logits and hold them to each other."""
    folder = GOLDEN / "composition"
    ids = load_file(GOLDEN / "families" / BASE / "expected.safetensors")["ids"]
    with torch.no_grad():
        model = None
        for name in PARTS:
            source = GOLDEN / "adapters" / name
            if model is None:
                model = PeftModel.from_pretrained(load_base(GOLDEN / "families" / BASE), source, adapter_name=name)
            else:
                model.load_adapter(source, adapter_name=name)
        model.base_model.set_adapter(list(PARTS))
        for module in model.modules():
            for name, weight in PARTS.items():
                if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                    module.scaling[name] *= weight
        logits = model.eval()(input_ids=ids).logits
        ours = PeftModel.from_pretrained(load_base(GOLDEN / "families" / BASE), folder).eval()
        report = adapter_report(ours, folder)
        assert not report["unexpected_keys"] and not report["missing_keys"], report
        logits_of_ours = ours(input_ids=ids).logits
    difference = (logits - logits_of_ours).abs().max().item()
    assert difference < 1e-5, difference
    base = load_file(GOLDEN / "families" / BASE / "expected.safetensors")["logits"]
    assert (logits - base).abs().max().item() > 0.1
    save_tensors(folder / "expected.safetensors", {"ids": ids, "logits": logits, "logits_of_ours": logits_of_ours})
    print(f"composition: largest difference {difference:.2e}")
