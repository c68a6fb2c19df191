"""Predicted against measured seconds: the demo models, and full-width structures cut to one block of each kind.

    python benchmarks/predictions.py -o benchmarks/results/DATE-predictions.md
    python benchmarks/predictions.py --only demo/dit --dtype float32 --runs 2

For an idle machine. Each model is a bench (`edit-compile bench`): teacher and conversion in turns, random weights. The share is of what was
measured: +25% is a prediction that is too long by a quarter.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from edit_compile.bench import size_in_words
from edit_compile.bench.run import Bench, BenchReport
from edit_compile.bench.subjects import BOUND, TEACHER
from edit_compile.config import LinearizeConfig
from edit_compile.report.markdown import markdown_table

MODELS = {  # blocks of each kind, and sides in pixels
    "demo/dit": (None, (64, 128)),
    "demo/mm-dit": (None, (64, 128)),
    "arch/pixart-sigma": (1, (512, 1024)),
    "arch/sd3.5-medium": (1, (512, 1024)),
    "arch/flux-dev": (1, (512, 1024)),
}
GOAL = 0.25
HEAD = ("model", "px", "", "measured", "predicted", "off by", "speed-up", "predicted", "off by")


def rows(report: BenchReport) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield a row for the teacher and each conversion at each size, and by how much its prediction is off."""
    by_name = {(row.size, row.name): row for row in report.rows}
    for row in report.rows:
        teacher = by_name[row.size, TEACHER]
        if row.name == BOUND or row.predicted is None or row.seconds is None or teacher.seconds is None or teacher.predicted is None:
            continue
        off = row.predicted / row.seconds.median - 1
        cells = [report.model, size_in_words(row.size), row.name]
        cells += [f"{1000 * row.seconds.median:,.1f} ms", f"{1000 * row.predicted:,.1f} ms", f"{off:+.0%}"]
        if row.speedup is not None and row is not teacher:
            faster = teacher.predicted / row.predicted
            cells += [f"{row.speedup.median:.2f}x", f"{faster:.2f}x", f"{faster / row.speedup.median - 1:+.0%}"]
        yield (*cells, *[""] * (len(HEAD) - len(cells))), off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="Markdown file to write; default: print only")
    parser.add_argument("--only", action="append", choices=list(MODELS), help="a model; repeatable; default: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--smallest", action="store_true", help="the first size alone, of one block")
    parser.add_argument("--runs", type=int, default=5, help="timed rounds")
    arguments = parser.parse_args()
    table: list[tuple[str, ...]] = []
    worst, machine = 0.0, ""
    for name in arguments.only or MODELS:
        blocks, sides = MODELS[name]
        options = {"dtype": getattr(torch, arguments.dtype), "compiled": not arguments.eager}
        bench = Bench.make(name, {"student": LinearizeConfig()}, blocks=1 if arguments.smallest else blocks, **options)
        report = bench.run([(side, side) for side in sides[: 1 if arguments.smallest else None]], runs=arguments.runs)
        machine = f"{report.machine}, torch {report.torch}, {report.dtype}, {'compiled' if report.compiled else 'not compiled'}"
        for cells, off in rows(report):
            table.append(cells)
            worst = max(worst, abs(off))
            print(*cells, sep=" | ", flush=True)
        for row in report.rows:
            if row.problem is not None:
                print(f"{name}, {row.name}: {row.problem}")
    verdict = f"The worst is off by {worst:.0%}; the goal is {GOAL:.0%}."
    print(verdict)
    if arguments.output is not None:
        load = f"load average {os.getloadavg()[0]:.1f} at the end"
        where = f"`benchmarks/predictions.py`, {time.strftime('%Y-%m-%d')}, {machine}, {load}, {arguments.runs} rounds in turns."
        parts = (
            "# Predicted against measured seconds of a forward",
            where,
            markdown_table(HEAD, table, range(3, len(HEAD))),
            verdict,
        )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
