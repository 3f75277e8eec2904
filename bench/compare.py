"""Espalier against PEFT on the same machine, in turn.

usage: compare.py WORKLOAD... [--rounds 3] [--espalier target/release/espalier] [--python python3]
       compare.py --render            writes the tables of docs/performance.md from bench/runs/
       compare.py --list              workloads

Every round runs Espalier, then each setting of the reference, so that a slow spell of the machine hits all. A run that
starts while others use the machine (more than 0.3 of a core, over half a second before it) is marked. The ratio that
counts is against the fastest setting of the reference. Raw results go to bench/runs/WORKLOAD.json.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
RUNS = HERE / "runs"
DOC = HERE.parent / "docs" / "performance.md"

SMALL = "--hidden 256 --layers 4 --heads 4 --kv-heads 4 --seq 128 --ff 704"
LARGE = "--hidden 1024 --layers 8 --heads 16 --kv-heads 16 --seq 512 --ff 2816"
CUDA_1B = "--device cuda --hidden 2048 --layers 22 --heads 32 --kv-heads 4 --ff 5632 --vocab 32000 --batch 4 --seq 2048"
CUDA_7B = "--device cuda --hidden 4096 --layers 32 --heads 32 --kv-heads 32 --ff 11008 --vocab 32000 --batch 2 --seq 2048"
PLAIN = {"default": ""}
HALF = {"default": "", "adapters in bf16": "--adapter-dtype base", "autocast": "--autocast"}
FAST = {"default": "", "adapters in bf16": "--adapter-dtype base"}

CUDA_DECODE = "--device cuda --hidden 2048 --layers 22 --heads 32 --kv-heads 4 --ff 5632 --vocab 32000"
COMPILED = {**FAST, "adapters in bf16, compiled": "--adapter-dtype base --compile"}

# name: (command, flags of both sides, settings of the reference, other settings of ours)
WORKLOADS = {
    "cpu-f32": ("train", "--dtype float32", PLAIN),
    "cpu-bf16": ("train", "--dtype bfloat16", HALF),
    "cpu-dora": ("train", "--dtype float32 --dora", PLAIN),
    "cpu-small": ("train", "--dtype float32 " + SMALL, PLAIN),
    "cpu-large": ("train", "--dtype float32 --steps 4 --warmup 1 " + LARGE, PLAIN),
    "cpu-large-bf16": ("train", "--dtype bfloat16 --steps 4 --warmup 1 " + LARGE, HALF),
    "cpu-decode-1": ("generate", "--dtype float32 --batch 1", PLAIN),
    "cpu-decode-8": ("generate", "--dtype float32 --batch 8", PLAIN),
    "cpu-decode-8-adapters": ("generate", "--dtype float32 --batch 8 --adapters 8", PLAIN, {"one adapter": "--adapters 1"}),
    "cuda-decode-1": ("generate", "--dtype bfloat16 --batch 1 " + CUDA_DECODE, PLAIN),
    "cuda-decode-32": ("generate", "--dtype bfloat16 --batch 32 " + CUDA_DECODE, PLAIN),
    "cuda-1b": ("train", "--dtype bfloat16 " + CUDA_1B, COMPILED),
    "cuda-1b-dora": ("train", "--dtype bfloat16 --dora " + CUDA_1B, PLAIN),
    "cuda-7b": ("train", "--dtype bfloat16 " + CUDA_7B, COMPILED),
}


def busy_cores():
    """Cores in use by anything, over half a second."""
    def ticks():
        fields = [int(n) for n in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    try:
        (all_before, idle_before), _, (all_after, idle_after) = ticks(), time.sleep(0.5), ticks()
    except OSError:
        return None
    return round(os.cpu_count() * (1 - (idle_after - idle_before) / max(1, all_after - all_before)), 2)


def run(command):
    busy = busy_cores()
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "["))]
    if done.returncode != 0 or not lines:
        sys.exit(f"{' '.join(command)}\nfailed with code {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(lines[-1])
    found = found[0] if isinstance(found, list) else found
    return {**found, "busy_cores_before": busy, "wall_s": round(time.time() - began, 2)}


def graphics():
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return f"{name} (driver {driver})"


def processor():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        flags = text.split("flags", 1)[1].splitlines()[0]
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
        kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16") if f" {kind} " in flags + " "]
        return f"{os.cpu_count()} cores {name} ({', '.join(kinds)})"
    except (OSError, IndexError, StopIteration):
        return platform.processor()


def measure(workload, options):
    kind, flags, settings, *rest = WORKLOADS[workload]
    ours_flags = flags.replace("--batch ", "--batches ") if kind == "generate" else flags
    ours = [options.espalier, "bench", kind, *ours_flags.replace("cuda ", "cuda:0 ").split(), "--json"]
    script = str(HERE / f"peft_{kind}.py")
    sides = {"espalier": ours}
    for name, extra in (rest[0] if rest else {}).items():
        flag, value = extra.split()
        sides[f"espalier, {name}"] = [value if i > 0 and ours[i - 1] == flag else part for i, part in enumerate(ours)]
    for name, extra in settings.items():
        sides[f"PEFT, {name}"] = [options.python, script, *flags.split(), *extra.split()]
    results = {name: [] for name in sides}
    for i in range(options.rounds):
        for name, command in sides.items():
            found = run(command)
            found["loaded_machine"] = (found["busy_cores_before"] or 0) > 0.3
            results[name].append(found)
            print(f"{workload} {i + 1}/{options.rounds} {name}: {rate(found):.0f} tokens/s", file=sys.stderr)
    RUNS.mkdir(exist_ok=True)
    record = {"workload": workload, "flags": flags, "machine": graphics() if "cuda" in flags else processor(), "date": time.strftime("%Y-%m-%d"),
              "sides": results}
    (RUNS / f"{workload}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def rate(found):
    return found.get("tokens_per_s", found.get("decode_tokens_per_s"))


def table(record):
    medians = {name: statistics.median(map(rate, runs)) for name, runs in record["sides"].items()}
    best = max(value for name, value in medians.items() if not name.startswith("espalier"))
    rows = ["| | tokens/s (min to max) | to the fastest PEFT | peak MiB | first step s | share of floor |",
            "|---|---:|---:|---:|---:|---:|"]
    for name, runs in record["sides"].items():
        rates = [rate(r) for r in runs]
        peak = max((r.get("peak_mib") or 0) for r in runs)
        first = statistics.median(r.get("first_step_s", 0) for r in runs)
        share = statistics.median(r.get("share_of_floor", 0) for r in runs)
        mark = " (busy machine)" if any(r["loaded_machine"] for r in runs) else ""
        rows.append(f"| {name}{mark} | {medians[name]:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {medians[name] / best:.2f} | "
                    f"{peak or ''} | {f'{first:.1f}' if first else ''} | {f'{share:.0%}' if share else ''} |")
    command = f"python bench/compare.py {record['workload']}"
    torch = next((r["torch"] for runs in record["sides"].values() for r in runs if "torch" in r), "?")
    return f"**{record['workload']}** (`{record['flags']}`), {record['machine']}, torch {torch}, {record['date']}: `{command}`\n\n" + "\n".join(rows)


def render():
    records = [record for path in sorted(RUNS.glob("*.json")) if "workload" in (record := json.loads(path.read_text()))]
    text = DOC.read_text()
    begin, end = "<!-- tables of bench/compare.py -->", "<!-- end of tables -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    tables = "\n\n".join(table(record) for record in records)
    DOC.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{after}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("workloads", nargs="*", metavar="WORKLOAD")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--espalier", default=str(HERE.parent / "target/release/espalier"))
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--render", action="store_true")
    p.add_argument("--list", action="store_true")
    options = p.parse_args()
    if options.list:
        print("\n".join(WORKLOADS))
    unknown = [w for w in options.workloads if w not in WORKLOADS]
    if unknown:
        p.error(f"unknown workloads: {', '.join(unknown)} (see --list)")
    for workload in options.workloads:
        print(table(measure(workload, options)))
        print()
    if options.render:
        render()


if __name__ == "__main__":
    main()
