"""What a device's rates predict of whole models, where there is no such device: teacher, student and speed-up of a forward, compiled.

    python benchmarks/predicted_latency.py --write benchmarks/results/DATE-predicted-latency.md
    python benchmarks/predicted_latency.py --only pixart-sigma --softmax 350

The rates are assumptions: the defaults are about what an H100's kernels are said to reach in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import edit_compile as ec
from edit_compile.adapters.random_model import random_model
from edit_compile.bench.roofline import Roofline
from edit_compile.files import write_text
from edit_compile.report.markdown import markdown_table

MODELS = ("pixart-sigma", "sd3.5-medium", "flux-dev")
SIDES = (1024, 2048, 4096, 8192)
HEAD = ("model", "px", "image tokens", "teacher", "student", "speed-up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file to write")
    parser.add_argument("--only", action="append", choices=MODELS, help="a model; repeatable; default: all")
    parser.add_argument("--design", default="auto", help="default: %(default)s")
    parser.add_argument("--product", type=float, default=700, help="TFLOPs a second of matrix products; default: %(default)s")
    parser.add_argument("--softmax", type=float, default=550, help="of fused attention; default: %(default)s")
    parser.add_argument("--depthwise", type=float, default=15, help="of depthwise convolutions; default: %(default)s")
    parser.add_argument("--bandwidth", type=float, default=2.8, help="TB a second; default: %(default)s")
    parser.add_argument("--overhead", type=float, default=4, help="microseconds of the smallest operation; default: %(default)s")
    arguments = parser.parse_args()
    rates = Roofline(
        device="assumed rates",
        threads=1,
        torch_version=torch.__version__,
        dtype="bfloat16",
        product=1e12 * arguments.product,
        softmax=1e12 * arguments.softmax,
        depthwise=1e12 * arguments.depthwise,
        bandwidth=1e12 * arguments.bandwidth,
        overhead=1e-6 * arguments.overhead,
    )
    table: list[tuple[str, ...]] = []
    for name in arguments.only or MODELS:
        model = random_model(f"arch/{name}", device="meta", dtype=torch.bfloat16).model
        report = ec.cost(model, [(side, side) for side in SIDES], config=ec.LinearizeConfig(design=arguments.design), rates=rates)
        for found in report.costs:
            before, after = found.seconds_before, found.seconds_after
            times = (f"{1000 * before:,.1f} ms", f"{1000 * after:,.1f} ms", f"{before / after:.2f}x")
            table.append((name, found.size, f"{found.image:,}", *times))
            print(*table[-1], sep=" | ", flush=True)
        for size, problem in report.errors.items():
            print(f"{name}, {size} px: {problem}")
    if arguments.write is not None:
        rates_in_words = (
            f"{arguments.product:g} TFLOPs a second of products, {arguments.softmax:g} of fused attention, {arguments.depthwise:g} of "
            f"depthwise convolutions, {arguments.bandwidth:g} TB/s, {arguments.overhead:g} us an operation"
        )
        how = f"Whole models, one sample, bfloat16, compiled, design {arguments.design}; {time.strftime('%Y-%m-%d')}."
        note = f"Assumed rates, not measured: {rates_in_words}. {how}"
        rows = markdown_table(HEAD, table, range(2, len(HEAD)))
        parts = ("# Predicted latency on a GPU", "`python benchmarks/predicted_latency.py`", note, rows)
        write_text(arguments.write, "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
