"""Tokens a second and peak memory of a training step against length, rank and depth, as measured and as plots.

usage: scaling.py cpu|cuda [--espalier target/release/espalier]
       scaling.py --render      draws docs/scaling-cpu.svg and docs/scaling-cuda.svg from bench/runs/

Each point is one run of `espalier bench train`; results go to bench/runs/scaling-cpu.json and scaling-cuda.json.
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
RUNS = HERE / "runs"
DOCS = HERE.parent / "docs"

# device: (flags of all points, {what: (flag, values, flags beside it)})
SWEEPS = {
    "cpu": ("--dtype float32 --steps 3 --warmup 1", {
        "length": ("--seq", [64, 128, 256, 512, 1024, 2048], "--batch 1"),
        "rank": ("--rank", [4, 8, 16, 32, 64, 128, 256], ""),
        "layers": ("--layers", [2, 4, 8, 16], ""),
    }),
    "cuda": ("--device cuda:0 --dtype bfloat16 --hidden 2048 --heads 32 --kv-heads 4 --ff 5632 --vocab 32000 --steps 5 --warmup 2", {
        "length": ("--seq", [512, 1024, 2048, 4096, 8192, 16384], "--batch 1 --layers 22"),
        "rank": ("--rank", [4, 16, 64, 256], "--batch 4 --seq 2048 --layers 8"),
        "layers": ("--layers", [2, 8, 16, 22], "--batch 4 --seq 2048"),
    }),
}


def measure(device, espalier):
    base, sweeps = SWEEPS[device]
    record = {"device": device, "flags": base, "date": time.strftime("%Y-%m-%d"), "points": {}}
    for what, (flag, values, beside) in sweeps.items():
        points = record["points"][what] = []
        for value in values:
            command = [espalier, "bench", "train", *base.split(), *beside.split(), flag, str(value), "--json"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{' '.join(command)}\nfailed with code {done.returncode}:\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            points.append({what: value, **{k: found[k] for k in ("tokens_per_s", "peak_mib", "share_of_floor", "step_s")}})
            print(f"{device} {what} {value}: {found['tokens_per_s']:.0f} tokens/s, {found['peak_mib']} MiB", file=sys.stderr)
    (RUNS / f"scaling-{device}.json").write_text(json.dumps(record, indent=1) + "\n")


def nice(top):
    step = 10 ** math.floor(math.log10(top))
    return next(step * m for m in (1, 2, 2.5, 5, 10) if step * m >= top)


def panel(points, what, key, title, x0, y0, w=260, h=150):
    top = nice(max(p[key] for p in points))
    xs = [math.log2(p[what]) for p in points]
    at = lambda p: (x0 + (math.log2(p[what]) - xs[0]) / (xs[-1] - xs[0]) * w, y0 + h - p[key] / top * h)
    out = [f'<text x="{x0}" y="{y0 - 10}" class="title">{title}</text>',
           f'<path d="M{x0} {y0}V{y0 + h}H{x0 + w}" class="axis"/>']
    for i in range(5):
        y = y0 + h - i * h / 4
        out.append(f'<path d="M{x0} {y}H{x0 + w}" class="grid"/><text x="{x0 - 6}" y="{y + 4}" class="y">{f"{top * i / 4:,.1f}".removesuffix(".0")}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    out.append(f'<polyline points="{line}" class="line"/>')
    for p in points:
        x, y = at(p)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{what} {p[what]}: {p[key]:g}</title></circle>'
                   f'<text x="{x:.1f}" y="{y0 + h + 16}" class="x">{p[what]}</text>')
    out.append(f'<text x="{x0 + w / 2}" y="{y0 + h + 32}" class="x">{what}</text>')
    return "\n".join(out)


def draw(record):
    style = ("text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.x{text-anchor:middle}.y{text-anchor:end}"
             ".axis{stroke:#333;fill:none}.grid{stroke:#ddd}.line{stroke:#2563eb;fill:none;stroke-width:2}circle{fill:#2563eb}")
    parts = []
    for row, (what, points) in enumerate(record["points"].items()):
        y = 40 + row * 225
        parts.append(panel(points, what, "tokens_per_s", f"tokens a second by {what}", 80, y))
        parts.append(panel(points, what, "peak_mib", f"peak MiB by {what}", 440, y))
    height = 40 + len(record["points"]) * 225
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="740" height="{height}" viewBox="0 0 740 {height}">'
            f'<style>{style}</style><rect width="740" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("device", nargs="?", choices=SWEEPS)
    p.add_argument("--espalier", default="target/release/espalier")
    p.add_argument("--render", action="store_true")
    options = p.parse_args()
    if options.device:
        measure(options.device, options.espalier)
    if options.render:
        for path in sorted(RUNS.glob("scaling-*.json")):
            (DOCS / f"{path.stem}.svg").write_text(draw(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
