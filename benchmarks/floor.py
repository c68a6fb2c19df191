"""How near conversions are to their bound and to their floor: full-width structures cut to one or two blocks, compiled, in turns.

    python benchmarks/floor.py --write benchmarks/results/DATE-floor.md
    python benchmarks/floor.py --only sd3.5-medium-1024 --runs 3

For an idle machine. The bound is the model with its attention between image tokens taken out, projections and cross-attention kept; the
floor is the bound and what the design adds, at the best rates of this machine's own kernels, timed in the same rounds. Random weights.
SD3.5-medium is taken without its second attention, which is the image's own, as in PixArt-Sigma.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edit_compile.adapters.model_names import ARCHITECTURES
from edit_compile.bench.latency import Timing
from edit_compile.bench.run import Bench, BenchReport
from edit_compile.config import LinearizeConfig
from edit_compile.files import write_text
from edit_compile.report.markdown import markdown_table


@dataclass(frozen=True)
class Case:
    """A structure at a size, in pixels a side, and the options of its conversions."""

    model: str
    blocks: int
    side: int
    conversions: tuple[dict[str, Any], ...] = ({},)
    changes: dict[str, Any] = field(default_factory=dict)


FULL, RATIO = {"text_keys": "full"}, {"eta": "ratio"}
JOINT: tuple[dict[str, Any], ...] = ({}, FULL, RATIO, RATIO | FULL, {"reduction": 8}, RATIO | {"reduction": 8})
ONE_ATTENTION = {"dual_attention_layers": []}
CASES = {
    "pixart-sigma-1024": Case("pixart-sigma", 2, 1024, ({}, {"reduction": 8})),
    "sd3.5-medium-1024": Case("sd3.5-medium", 2, 1024, JOINT, ONE_ATTENTION),
    "pixart-sigma-2048": Case("pixart-sigma", 1, 2048, ({}, {"reduction": 8})),
    "sd3.5-medium-2048": Case("sd3.5-medium", 1, 2048, ({}, FULL, {"reduction": 8}), ONE_ATTENTION),
    **{f"{name}-{side}": Case(name, 1, side) for name in ("pixart-sigma", "sd3.5-medium") for side in (256, 512, 768)},
    **{f"{name}-4096": Case(name, 1, 4096) for name in ("pixart-sigma", "sd3.5-medium")},
}
LIMIT = 60.0  # seconds of a forward
HEAD = ("model", "px", "options", "teacher", "bound", "student", "teacher / student", "share of bound", "share of floor", "peak", "bound's")


def in_words(timing: Timing | None, scale: float, unit: str) -> str:
    """Write a median and its quartiles."""
    if timing is None:
        return "-"
    median, low, high = (f"{scale * x:,.{2 if unit == 'x' else 0}f}" for x in (timing.median, timing.low, timing.high))
    return f"{median}{unit} ({low} to {high})"


def rows(case: Case, report: BenchReport) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for each conversion."""
    by_name = {row.name: row for row in report.rows}
    teacher, bound = by_name["teacher"], by_name["bound"]
    for row in report.rows:
        if row in (teacher, bound):
            continue
        times = [in_words(each.seconds, 1000, " ms") if each.problem is None else each.problem for each in (teacher, bound, row)]
        shares = [in_words(row.speedup, 1, "x"), in_words(row.of_bound, 100, "%"), in_words(row.of_floor, 100, "%")]
        peaks = [f"{each.peak / 2**20:,.0f} MiB" if each.peak is not None else "-" for each in (row, bound)]
        blocks = f"{case.model}, {case.blocks} block{'s' if case.blocks > 1 else ''}"
        yield (blocks, str(case.side), row.name, *times, *shares, *peaks)


def measure(case: Case, runs: int) -> BenchReport:
    """Time the teacher, the bound and the conversions of a case in turns."""
    conversions = {", ".join(f"{key} {value}" for key, value in each.items()): LinearizeConfig(**each) for each in case.conversions}
    conversions = {name or "default": config for name, config in conversions.items()}
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((ARCHITECTURES / f"{case.model}.json").read_text()) | case.changes
        source = Path(folder) / "config.json"
        source.write_text(json.dumps(config))
        bench = Bench.make(str(source), conversions, dtype=torch.bfloat16, blocks=case.blocks, compiled=True)
        return bench.run([(case.side, case.side)], runs=runs, limit=LIMIT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file to write, after each case")
    parser.add_argument("--only", action="append", choices=list(CASES), help="a case; repeatable; default: all")
    parser.add_argument("--runs", type=int, default=7, help="timed rounds")
    arguments = parser.parse_args()
    table, report = [], None
    for name in arguments.only or CASES:
        torch.compiler.reset()
        report = measure(CASES[name], arguments.runs)
        for cells in rows(CASES[name], report):
            table.append(cells)
            print(*cells, sep=" | ", flush=True)
        print(*report.impossible.values(), sep="\n", flush=True)
        if arguments.write is not None:
            command = "python benchmarks/floor.py" + "".join(f" --only {each}" for each in arguments.only or ())
            note = f"{report.machine}, torch {report.torch}, bfloat16, compiled; {report.runs} rounds in turns; medians and quartiles; "
            load = f"load average {os.getloadavg()[0]:.1f} at the end, {time.strftime('%Y-%m-%d')}."
            write_text(
                arguments.write,
                "\n\n".join(("# Shares of bound and floor", f"`{command}`", note + load, markdown_table(HEAD, table))) + "\n",
            )


if __name__ == "__main__":
    main()
