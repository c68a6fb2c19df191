"""A bench as a table, and as JSON-ready data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape

from edit_compile.adapters.family import Extent
from edit_compile.bench.conversion_cost import size_in_words
from edit_compile.bench.run import BenchReport, BenchRow
from edit_compile.bench.subjects import TEACHER
from edit_compile.report.folded_table import FoldedTable
from edit_compile.report.tables import format_si
from edit_compile.words import bytes_in_words

_HEAD = (
    *("px", "image tokens", "model", "forward", "quartiles", "predicted"),
    *("teacher / it", "quartiles of it", "of bound", "of floor", "FLOPs", "peak"),
)


def bench_table(report: BenchReport) -> RenderableType:
    """Show a line for each subject and size: medians, quartiles, shares of the bound and of its floor, FLOPs, peak memory."""
    cut = f", cut to {report.blocks} of each kind of block" if report.blocks is not None else ""
    compiled = "compiled" if report.compiled else "not compiled"
    how = f"{report.model}{cut}, random weights, {report.dtype}, {compiled}, {report.runs} round{'s' * (report.runs > 1)} in turns, batch 1"
    where = f"{report.device}: {report.machine}, torch {report.torch}"
    table: RenderableType = FoldedTable(_HEAD, [_cells(row) for row in report.rows], left=(0, 2, 4, 7))
    unmeasured = [f"[dim]{escape(reason)}[/]" for reason in _reasons(report)]
    meaning = "[dim]bound: attention between image tokens taken out; floor: the bound and what a design adds, at best rates[/]"
    profiles = [part for size in report.sizes for part in _profile(report, size)]
    return Group(escape(how), escape(where), "", *([table, ""] if report.rows else []), *unmeasured, meaning, *profiles)


def _profile(report: BenchReport, size: Extent) -> Iterator[RenderableType]:
    """Yield the shares of all subjects at a size beside each other, those that are somewhere a percent or more."""
    shares = {
        row.name: {(each.part, each.kind): each.share for each in row.profile} for row in report.rows if row.size == size and row.profile
    }
    if not shares:
        return
    largest = Counter[tuple[str, str]]()
    for found in shares.values():
        largest |= Counter({what: round(1000 * share) for what, share in found.items()})
    rows = [
        (escape(f"{part}, {kind}"), *(f"{100 * found[part, kind]:.0f}%" if (part, kind) in found else "" for found in shares.values()))
        for (part, kind), most in largest.most_common()
        if most >= 10
    ]
    yield from ("", f"shares of the time at {size_in_words(size)} px")
    yield FoldedTable(("part of a site, kind of work", *map(escape, shares)), rows)


def _cells(row: BenchRow) -> tuple[str, ...]:
    size, tokens, flops = size_in_words(row.size), f"{row.tokens:,}", format_si(row.flops)
    predicted = "" if row.predicted is None else f"{_ms(row.predicted)} ms"
    if row.seconds is None:
        return (size, tokens, escape(row.name), "", "", predicted, *[""] * 4, flops, f"needs {bytes_in_words(row.needs)}")
    ratio, spread = ("", "") if row.speedup is None or row.name == TEACHER else (f"{row.speedup.median:.2f}x", _spread(row.speedup))
    shares = [f"{100 * share.median:.0f}%" if share is not None else "" for share in (row.of_bound, row.of_floor)]
    peak = "" if row.peak is None else bytes_in_words(row.peak)
    quartiles = f"{_ms(row.seconds.low)} .. {_ms(row.seconds.high)}"
    return size, tokens, escape(row.name), f"{_ms(row.seconds.median)} ms", quartiles, predicted, ratio, spread, *shares, flops, peak


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}"


def _spread(timing: Any) -> str:
    return f"{timing.low:.2f} .. {timing.high:.2f}"


def _reasons(report: BenchReport) -> Iterator[str]:
    yield from (f"{size_in_words(row.size)} px, {row.name}: {row.problem}" for row in report.rows if row.problem is not None)
    yield from report.impossible.values()


def bench_summary(report: BenchReport) -> dict[str, Any]:
    """Return a bench as JSON-ready data, in seconds, bytes, FLOPs and ratios."""
    return dataclasses.asdict(report)
