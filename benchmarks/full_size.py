"""Plan full-size models and count their FLOPs on the meta device: `edit-compile inspect` as a user runs it, timed.

    python benchmarks/full_size.py -o benchmarks/results/DATE-full-size.md

Each model runs in its own process; wall time, processor time and peak memory are those of the process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MODELS = {  # the expected actions
    "arch/sd3.5-medium": {"mm-edit": 24, "edit": 13},
    "arch/sd3.5-large": {"mm-edit": 38},
    "arch/flux-dev": {"mm-edit": 57},
    "arch/pixart-sigma": {"edit": 28, "keep": 28},
    "arch/dit-xl-2": {"edit": 28},
}
MOST_SECONDS, MOST_GIB = 40, 4


def inspect(model: str) -> dict[str, Any]:
    """Run `inspect --json` and add the process's wall and processor seconds and peak memory in GiB to what it prints."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "edit_compile", "inspect", model, "--json"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            raise SystemExit(f"inspect {model} failed")
        output.seek(0)
        found = json.load(output)
    return found | {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 2**20}


def row(model: str, found: dict[str, Any]) -> str:
    costs = found["cost"]["costs"]
    gains = ", ".join(f"{cost['height']} px {cost['ratio']:.2f}x" for cost in costs)
    actions = ", ".join(f"{number} {action}" for action, number in found["actions"].items())
    added = found["cost"]["added"] / found["cost"]["parameters"]
    measured = f"{found['wall']:.1f} s | {found['cpu']:.1f} s | {found['memory']:.2f} GiB"
    return f"| {model} | {actions} | {measured} | {added:.1%} | {gains} | {found['cost']['pays_from']:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="Markdown file to write; default: print only")
    arguments = parser.parse_args()
    lines = [
        "# Full-size models on the meta device",
        "",
        f"`python benchmarks/full_size.py`, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {os.cpu_count()} cores, "
        f"{platform.machine()}, load average {os.getloadavg()[0]:.1f} at the start. No weights; capture, plan, conversion and six counted "
        "forwards included.",
        "",
        "| model | sites | wall | processor | peak memory | parameters added | FLOPs before / after | break-even, image tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    failures = []
    for model, expected in MODELS.items():
        found = inspect(model)
        lines.append(row(model, found))
        print(lines[-1], flush=True)
        if found["actions"] != expected:
            failures.append(f"{model}: {found['actions']}, expected {expected}")
        if found["wall"] > MOST_SECONDS or found["memory"] > MOST_GIB:
            failures.append(f"{model}: over {MOST_SECONDS} s or {MOST_GIB} GiB")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
