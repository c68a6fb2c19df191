"""What users read besides the plan's own table: costs and speed as tables, and all of it as JSON-ready data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape

from edit_compile.bench.conversion_cost import CostReport
from edit_compile.bench.latency import SpeedRow, Timing
from edit_compile.ir.plan import Plan
from edit_compile.ir.plan_table import listed
from edit_compile.ir.symbol_names import readable_names
from edit_compile.report.folded_table import FoldedTable
from edit_compile.words import bytes_in_words, counted

BREAK_EVEN = 1.05  # a ratio of FLOPs below which nobody would notice a gain


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON-ready data, with counts, of the sites its table shows. `sizes` explains the names in layouts."""
    names, sites = readable_names(plan), listed(plan)
    return {
        "model": plan.model,
        "actions": dict(Counter(site.action for site in sites)),
        "grid": plan.grid.model_dump(),
        "min_tokens": plan.min_tokens,
        "sizes": names.meanings,
        "sites": [
            {
                "path": site.path,
                "kind": site.kind,
                "action": site.action,
                "options": site.options,
                "reason": site.reason,
                "refusal": site.refusal and site.refusal.model_dump(),
                "queries": names.layout(site.query_layout),
                "keys": names.layout(site.key_layout),
                "grid": names.grid(site.grid),
            }
            for site in sites
        ],
    }


def cost_table(report: CostReport) -> RenderableType:
    """Show the parameters added and a line of forward FLOPs for each size, after a warning where nothing is gained."""
    share = report.added / report.parameters
    lines = [*_warnings(report), f"{format_si(report.added)} parameters added to {format_si(report.parameters)} ({share:.1%})"]
    head, *rows = cost_rows(report)
    styles = ["green" if cost.ratio >= BREAK_EVEN else "red" for cost in report.costs]
    ratio = head.index("ratio")
    coloured = [(*row[:ratio], f"[{style}]{row[ratio]}[/]", *row[ratio + 1 :]) for style, row in zip(styles, rows, strict=True)]
    table = ("[bold]FLOPs of one forward[/]", FoldedTable(head, coloured, left=())) if rows else ()
    errors = [f"[dim]{escape(reason)}[/]" for reason in report.errors.values()]
    return Group(*lines, *table, *_meaning(report), *errors)


def cost_rows(report: CostReport) -> Iterator[tuple[str, ...]]:
    """Yield the head of a table of FLOPs, and its row for each size; with predicted speed-ups where a machine's rates are known."""
    predicted = ("predicted",) if report.rates is not None else ()
    yield "px", "image tokens", "text tokens", "before", "after", "ratio", *predicted
    for cost in report.costs:
        sizes = (cost.size, f"{cost.image:,}", "" if cost.text is None else f"{cost.text:,}")
        faster = f"{cost.seconds_before / cost.seconds_after:.2f}x" if cost.seconds_before and cost.seconds_after else ""
        yield *sizes, format_si(cost.before), format_si(cost.after), f"{cost.ratio:.2f}x", *(faster for _ in predicted)


def _meaning(report: CostReport) -> list[str]:
    if report.rates is None:
        return []
    where = f", by which it pays from {report.break_even_predicted:,} image tokens on" if report.break_even_predicted else ""
    rates = report.rates
    machine = f"{escape(rates.device)}, {counted(rates.threads, 'thread')}"
    return [f"[dim]predicted: speed-up of a forward, compiled, {rates.dtype}, on {machine}{where}[/]"]


def _warnings(report: CostReport) -> list[str]:
    losing = [cost for cost in report.costs if cost.ratio < BREAK_EVEN]
    where = ", ".join(f"{c.size} px ({format_si(c.before)} FLOPs before, {format_si(c.after)} after)" for c in losing)
    return [f"[bold red]No gain at {where}.[/]{_advice(report)}"] if losing else []


def _advice(report: CostReport) -> str:
    if not report.break_even_tokens:
        return ""
    where = f"{report.break_even_tokens:,} image tokens"
    if report.pixels_per_token and not any(cost.frames for cost in report.costs):
        where += f" ({report.break_even_tokens**0.5 * report.pixels_per_token:,.0f} px square)"
    return f" Break-even is near {where}; cheaper options of the design (--set) lower it."


def format_si(number: int) -> str:
    """Write a number with an SI prefix and three significant digits: 93.6 M, 3.91 P."""
    value, units = float(number), ["", " K", " M", " G", " T", " P"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g}{units[0]}"


def cost_summary(report: CostReport) -> dict[str, Any]:
    """Return the costs as JSON-ready data, in FLOPs, sites one by one; `pays_from` is in image tokens."""
    return {
        "parameters": report.parameters,
        "added": report.added,
        "costs": [{**dataclasses.asdict(cost), "ratio": cost.ratio} for cost in report.costs],
        "impossible": dict(report.errors),
        "pays_from": report.break_even_tokens,
        "pixels_per_token": report.pixels_per_token,
        "rates": report.rates and report.rates.model_dump(),
        "predicted_to_pay_from": report.break_even_predicted,
    }


def speed_table(rows: Sequence[SpeedRow]) -> RenderableType:
    """Show milliseconds of one forward of teacher and student, quartiles of the ratio, and peak memory where it was measured."""
    with_memory = any(row.memory for row in rows)
    head = ("px", "teacher", "student", "speed-up", "quartiles", *(["teacher's peak", "student's peak"] if with_memory else []))
    lines = []
    for row in rows:
        style = "green" if row.speedup.median >= 1 else "red"
        spread = f"{row.speedup.low:.2f} .. {row.speedup.high:.2f}"
        memory = [bytes_in_words(peak) for peak in row.memory] if row.memory else [""] * (len(head) - 5)
        ratio = f"[{style}]{row.speedup.median:.2f}x[/]"
        frames = "" if row.frames is None else f"{row.frames} x "
        lines.append((f"{frames}{row.height} x {row.width}", _ms(row.teacher), _ms(row.student), ratio, spread, *memory))
    return Group("[bold]one forward, median of alternating calls[/]", FoldedTable(head, lines, left=()))


def _ms(timing: Timing) -> str:
    return f"{timing.median * 1000:,.1f} ms"
