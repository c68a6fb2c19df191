"""Teacher against student for a transformer of one full-width block: the widths of PixArt-Sigma and SD3.5-medium.

    python benchmarks/speed.py -o benchmarks/results/DATE-speed.md
    python benchmarks/speed.py --tokens 1024 --tokens 4096 --dtype bf16 --eager-only

Random weights. Both are timed by alternating calls in one process (see `edit_compile.bench`), so that the ratio holds on a busy
machine; its quartiles are given. Both include patch embedding and output layers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import edit_compile as ec
from edit_compile.adapters import load_model as models
from edit_compile.bench import SpeedRow

PIXELS = {1024: 512, 4096: 1024, 16384: 2048}  # of a square with this number of image tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS: dict[str, dict[str, Any]] = {"pixart-sigma": {"num_layers": 1}, "sd3.5-medium": {"num_layers": 1, "dual_attention_layers": []}}


def one_block(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A converted model of the architecture with one block, with random weights."""
    config = json.loads((Path(models.__file__).parent / "arch" / f"{name}.json").read_text()) | BLOCKS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, config["_class_name"]).from_config(config)
    return ec.linearize(model.eval().to(device, dtype))


def measured(arguments: argparse.Namespace) -> Iterator[tuple[str, str, bool, int, SpeedRow]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in BLOCKS:
        for dtype in arguments.dtype or DTYPES:
            for compiled in (False,) if arguments.eager_only else (False, True):
                student = one_block(name, DTYPES[dtype], device)
                for tokens in arguments.tokens or PIXELS:
                    side = PIXELS[tokens]
                    (row,) = ec.compare_speed(student, [(side, side)], runs=arguments.runs, warmup=1, compiled=compiled)
                    yield name, dtype, compiled, tokens, row


def line(name: str, dtype: str, compiled: bool, tokens: int, row: SpeedRow) -> str:
    how = "compiled" if compiled else "eager"
    seconds = f"{row.teacher.median * 1000:,.0f} ms | {row.student.median * 1000:,.0f} ms"
    spread = f"{row.speedup.low:.2f} to {row.speedup.high:.2f}"
    return f"| {name} | {dtype} | {how} | {tokens:,} | {seconds} | {row.speedup.median:.2f}x | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="Markdown file to write; default: print only")
    parser.add_argument("--tokens", type=int, action="append", choices=list(PIXELS), help="image tokens; repeatable; default: all")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="repeatable; default: both")
    parser.add_argument("--eager-only", action="store_true", help="do not time torch.compile")
    parser.add_argument("--runs", type=int, default=5, help="timed calls of each")
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        "# One block, teacher against student",
        "",
        f"`benchmarks/speed.py`, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {where}, load average {os.getloadavg()[0]:.1f} "
        f"on {os.cpu_count()} cores at the start, {arguments.runs} alternating runs of each; the designs' default options.",
        "",
        "| width of | dtype | mode | image tokens | teacher | student | speed-up | quartiles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in measured(arguments):
        lines.append(line(*found))
        print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
