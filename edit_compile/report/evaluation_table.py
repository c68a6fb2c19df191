"""An evaluation as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table


def evaluation_table(result: Mapping[str, Any]) -> RenderableType:
    """Show an evaluation's JSON: how the images were made, a line for each metric, and the versions of the libraries."""
    sampling, (first, last) = result["sampling"], result["seeds"]
    steps, guidance = (sampling[name] if sampling[name] is not None else "default" for name in ("steps", "guidance"))
    how = f"{result['height']} x {result['width']} px, seeds {first} to {last}, steps {steps}, guidance {guidance}, {sampling['dtype']}"
    lines = [f"{result['model']}: {result['samples']:,} images each of teacher and student, {how}"]
    if result["real"] is not None:
        real = result["real"]
        lines.append(f"{real['count']:,} real images of {real['folder']}, {real['resize']}")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("metric", "teacher", "student", "better", "against", "network", "resize"):
        table.add_column(name, justify="right" if name in ("teacher", "student") else "left")
    libraries: dict[str, str] = {}
    for metric in result["metrics"]:
        values = (_number(metric["teacher"]), _number(metric["student"]), metric["better"])
        table.add_row(metric["name"], *values, *(escape(metric[name]) for name in ("against", "network", "resize")))
        libraries |= metric["libraries"]
    versions = ", ".join(f"{name} {number}" for name, number in libraries.items())
    return Group(*map(escape, lines), table, f"[dim]{escape(versions)}[/]")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
