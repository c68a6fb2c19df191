"""An evaluation as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape

from edit_compile.report.folded_table import FoldedTable


def evaluation_table(result: Mapping[str, Any]) -> RenderableType:
    """Show an evaluation's JSON: how the images were made, a line for each metric, what judged, and the libraries' versions."""
    sampling, (first, last) = result["sampling"], result["seeds"]
    steps, guidance = (sampling[name] if sampling[name] is not None else "default" for name in ("steps", "guidance"))
    how = f"{result['height']} x {result['width']} px, seeds {first} to {last}, steps {steps}, guidance {guidance}, {sampling['dtype']}"
    lines = [f"{result['model']}: {result['samples']:,} images each of teacher and student, {how}"]
    if result["real"] is not None:
        real = result["real"]
        lines.append(f"{real['count']:,} real images of {real['folder']}, {real['resize']}")
    metrics = result["metrics"]
    rows = [(m["name"], _number(m["teacher"]), _number(m["student"]), m["better"], escape(m["against"])) for m in metrics]
    table = FoldedTable(("metric", "teacher", "student", "better", "against"), rows, left=(0, 3, 4))
    networks = [f"{m['name']}: {m['network']}; resize: {m['resize']}" for m in metrics]
    versions = dict.fromkeys(f"{name} {number}" for m in metrics for name, number in m["libraries"].items())
    return Group(*map(escape, lines), table, *(f"[dim]{escape(line)}[/]" for line in (*networks, ", ".join(versions))))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
