"""Write golden/: everything, or only the named parts (families adapters methods prompts curves sft quant optim composition). See README.md."""

import sys
from importlib import import_module

from common import GOLDEN, manifest

PARTS = ["families", "adapters", "methods", "prompts", "curves", "sft", "quant", "optim", "composition"]
LIMIT = 5_000_000


def main(parts):
    """Make the parts in order, then the manifest."""
    for part in parts:
        import_module(part).make()
    for path in GOLDEN.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    listing = manifest()
    lines = ",\n".join(
        f'  {{"file": "{r["file"]}", "bytes": {r["bytes"]}, "sha256": "{r["sha256"]}"}}' for r in listing["files"]
    )
    text = f'{{\n "total_bytes": {listing["total_bytes"]},\n "files": [\n{lines}\n ]\n}}\n'
    (GOLDEN / "MANIFEST.json").write_text(text)
    for r in listing["files"]:
        print(f'{r["bytes"]:8} {r["file"]}')
    total = listing["total_bytes"] + len(text)
    print(f"{total:8} in all")
    if total > LIMIT:
        sys.exit(f"golden files exceed {LIMIT} bytes")


if __name__ == "__main__":
    unknown = [p for p in sys.argv[1:] if p not in PARTS]
    if unknown:
        sys.exit(f"unknown part {unknown[0]!r}; parts: {' '.join(PARTS)}")
    main(sys.argv[1:] or PARTS)
