"""Below the break-even: the unconverted model against its student with and without `min_tokens`, in turns.

    python benchmarks/small_sizes.py --write benchmarks/results/DATE-small-sizes.md
    python benchmarks/small_sizes.py --only pixart-sigma --sides 256 --runs 3

For an idle machine. Full width, a few blocks of each kind, random weights, bfloat16, compiled. `predicted` is by the rates that
`edit-compile bench` last measured on this machine, which this script measures if there are none.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch

import edit_compile as ec
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.adapters.random_model import random_model
from edit_compile.api import block_options, repeated_blocks
from edit_compile.bench.latency import Timing, compare_calls
from edit_compile.bench.machine import machine_in_words
from edit_compile.bench.roofline import roofline
from edit_compile.files import write_text
from edit_compile.report.markdown import markdown_table

MODELS = ("pixart-sigma", "sd3.5-medium")
GRAPHS = 256  # of one kind of block: of the model, and of the student on both sides of `min_tokens`
HEAD = ("model", "px", "min_tokens", "unconverted", "student", "unconverted / student")


def in_words(timing: Timing, scale: float, unit: str) -> str:
    """Write a median and its quartiles."""
    digits = 2 if unit == "x" else 1
    median, low, high = (f"{scale * each:,.{digits}f}" for each in (timing.median, timing.low, timing.high))
    return f"{median}{unit} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file to write")
    parser.add_argument("--only", action="append", choices=MODELS, help="a model; repeatable; default: all")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 768], help="in pixels")
    parser.add_argument("--blocks", type=int, default=4, help="of each kind")
    parser.add_argument("--runs", type=int, default=15, help="timed rounds")
    arguments = parser.parse_args()
    dtype, device = torch.bfloat16, torch.device("cpu")
    roofline(device, dtype)
    table: list[tuple[str, ...]] = []
    for name in arguments.only or MODELS:
        torch.compiler.reset()
        model = random_model(f"arch/{name}", blocks=arguments.blocks, dtype=dtype).model
        student = ec.linearize(model)
        for compiled in (model, student):
            for path in repeated_blocks(student):  # as ec.compile does, which takes students alone
                compiled.get_submodule(path).compile(**block_options(graphs=GRAPHS))
        for least in (0, "predicted"):
            tokens = ec.set_min_tokens(student, least)
            for side in arguments.sides:
                inputs = inputs_for_size(model, side, side, device=device, dtype=dtype).inputs
                whole, converted, ratio, _ = compare_calls(partial(model, **inputs), partial(student, **inputs), runs=arguments.runs)
                times = in_words(whole, 1000, " ms"), in_words(converted, 1000, " ms")
                table.append(
                    (
                        f"{name}, {arguments.blocks} blocks",
                        str(side),
                        f"{least}: {tokens:,}" if least else "0",
                        *times,
                        in_words(ratio, 1, "x"),
                    )
                )
                print(*table[-1], sep=" | ", flush=True)
    if arguments.write is not None:
        load = f"load average {os.getloadavg()[0]:.1f} at the end, {time.strftime('%Y-%m-%d')}."
        note = f"{machine_in_words()}, torch {torch.__version__}, bfloat16, compiled; {arguments.runs} rounds in turns; {load}"
        write_text(arguments.write, "\n\n".join(("# Below the break-even", note, markdown_table(HEAD, table))) + "\n")


if __name__ == "__main__":
    main()
