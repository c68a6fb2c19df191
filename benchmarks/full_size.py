"""Full-size models on the meta device, as a user's commands see them: plan, FLOPs before and after, and what a recipe needs; timed.

    python benchmarks/full_size.py -o benchmarks/results/DATE-full-size.md       # all, one after the other
    python benchmarks/full_size.py --only wan2.1-t2v-14b --only z-image          # some of them

Each command runs in its own process; wall time, processor time and peak memory are those of the process, imports included. The processor
time of a busy machine is longer too, by up to a half where two processes share a core.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = {  # the expected actions
    "sd3.5-medium": {"mm-edit": 24, "edit": 13},
    "sd3.5-large": {"mm-edit": 38},
    "flux-dev": {"mm-edit": 57},
    "flux2-dev": {"mm-edit": 56},
    "qwen-image": {"mm-edit": 60},
    "z-image": {"mm-edit": 32, "keep": 2},
    "hunyuan-image": {"mm-edit": 60, "keep": 2},
    "pixart-sigma": {"edit": 28, "keep": 28},
    "dit-xl-2": {"edit": 28},
    "wan2.1-t2v-14b": {"edit": 40, "keep": 40},
    "hunyuan-video": {"mm-edit": 60, "keep": 2},
}
SECONDS = {"sd3.5-medium": 25, "flux-dev": 40}  # of the processor, for `inspect`
OTHER_SECONDS, MOST_GIB = 60, 4
RECIPES = Path(__file__).parents[1] / "recipes"


def run(*command: str) -> dict[str, Any]:
    """Run a subcommand with --json and add the process's wall and processor seconds and peak memory in GiB to what it prints."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "edit_compile", *command, "--json"], stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        output.seek(0)
        found = json.load(output)
    return {**found, "wall": wall, "processor": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 2**20}


def inspected(model: str, found: dict[str, Any]) -> str:
    """Format what `inspect` found as a row."""
    gains = ", ".join(f"{size(cost)} {cost['ratio']:.2f}x" for cost in found["cost"]["costs"])
    actions = ", ".join(f"{number} {action}" for action, number in found["actions"].items())
    added = found["cost"]["added"] / found["cost"]["parameters"]
    measured = f"{found['wall']:.0f} s | {found['processor']:.0f} s | {found['memory']:.2f} GiB"
    return f"| arch/{model} | {actions} | {measured} | {added:.1%} | {gains} | {found['cost']['pays_from']:,} |"


def counted(model: str, found: dict[str, Any]) -> list[str]:
    """Format the FLOPs that `inspect` counted as rows, one a size."""
    rows = []
    for cost in found["cost"]["costs"]:
        sites = [sum(site[when] for site in cost["sites"]) for when in ("before", "after")]
        totals = [f"{number / 1e12:,.1f}" for number in (cost["before"], cost["after"], *sites)]
        rows.append(f"| arch/{model} | {size(cost)} | {cost['image']:,} | {' | '.join(totals)} | {cost['ratio']:.2f}x |")
    return rows


def estimated(model: str, found: dict[str, Any]) -> list[str]:
    """Format a recipe's dry run as rows, one a phase."""
    trained = f"{found['trained'] / 1e9:.2f} of {found['parameters'] / 1e9:.2f} G"
    rows = []
    for phase in found["phases"]:
        batches = f"{phase['samples']} | {phase['micro_batch']}"
        flops, memory = f"{phase['flops'] / 1e15:,.1f} P", f"{phase['bytes'] / 2**30:,.1f} GiB"
        state = f"{found['state_bytes'] / 2**30:,.1f} GiB"
        rows.append(f"| {model} | {trained} | {state} | {phase['name']} | {size(phase)} | {batches} | {flops} | {memory} |")
    return rows + [f"| {model} | | | {phase} | not estimated: {reason} | | | | |" for phase, reason in found["impossible"].items()]


def size(place: dict[str, Any]) -> str:
    """Write a size in pixels, after the number of a video's frames."""
    frames = f"{place['frames']} x " if place.get("frames") else ""
    return f"{frames}{place['height']} x {place['width']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="Markdown file to write; default: print only")
    parser.add_argument("--only", action="append", choices=MODELS, help="a model; repeatable; default: all")
    parser.add_argument("--no-plans", action="store_true", help="leave out `inspect`")
    parser.add_argument("--no-recipes", action="store_true", help="leave out the dry runs of the recipes")
    arguments = parser.parse_args()
    started = f"{time.strftime('%Y-%m-%d')}, torch {version('torch')}, {os.cpu_count()} cores, {platform.machine()}"
    load = f"load average {os.getloadavg()[0]:.1f} at the start"
    plans, flops, recipes, failures = list[str](), list[str](), list[str](), list[str]()
    for model in arguments.only or MODELS:
        if not arguments.no_plans:
            found = run("inspect", f"arch/{model}")
            plans.append(inspected(model, found))
            flops += counted(model, found)
            print(plans[-1], *flops[-len(found["cost"]["costs"]) :], sep="\n", flush=True)
            failures += problems(model, found)
        if (RECIPES / f"{model}.yaml").is_file() and not arguments.no_recipes:
            recipes += estimated(model, run("distill", model, "--dry-run", "--set", f"model=arch/{model}"))
            print(*recipes[-5:], sep="\n", flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page(" ".join(["python", *sys.argv]), f"{started}, {load}", plans, flops, recipes))
    if failures:
        raise SystemExit("\n".join(failures))


def problems(model: str, found: dict[str, Any]) -> list[str]:
    """Say where a plan differs from what is expected, or takes too much."""
    most = SECONDS.get(model, OTHER_SECONDS)
    wrong = [] if found["actions"] == MODELS[model] else [f"{model}: {found['actions']}, expected {MODELS[model]}"]
    over = found["processor"] > most or found["memory"] > MOST_GIB
    return wrong + ([f"{model}: {found['processor']:.0f} s, {found['memory']:.1f} GiB; limits {most} s, {MOST_GIB} GiB"] if over else [])


def page(command: str, where: str, plans: list[str], flops: list[str], recipes: list[str]) -> str:
    """Put the rows together as a page."""
    parts = ["# Full-size models on the meta device", f"`{command}`, {where}. No weights."]
    if plans:
        parts += [
            "`edit-compile inspect`: capture, plan, conversion and the counted forwards included.",
            "| model | sites | wall | processor | peak memory | parameters added | FLOPs before / after | break-even, image tokens |\n"
            "|---|---|---|---|---|---|---|---|\n" + "\n".join(plans),
            "FLOPs of one forward of one sample, in units of 10^12, of the model and of its rewritten sites:",
            "| model | pixels | image tokens | before | after | sites before | sites after | ratio |\n|---|---|---|---|---|---|---|---|\n"
            + "\n".join(flops),
        ]
    if recipes:
        parts += [
            '`edit-compile distill NAME --dry-run --set model=arch/NAME`, in one process: "kept" is for weights, gradients, optimizer and '
            'moving average, "memory" with activations at the peak of a step.',
            "| recipe | trained | kept | phase | pixels | samples per step | per forward | FLOPs per step | memory |\n"
            "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(recipes),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
