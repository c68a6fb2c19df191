"""What users read: the plan and the costs of a conversion, as tables, in words and as JSON-ready data."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table

from edit_compile.ir.plan import Plan, SitePlan
from edit_compile.ir.symbol_names import Names, readable_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edit_compile.bench import CostReport, Row, Timing

UNLIMITED = 10_000
EVEN = 1.05  # a ratio of FLOPs below which nobody would notice a gain


@dataclass(frozen=True)
class PlanTable:
    """The plan as a table, sites of repeated blocks that are treated alike in one row, with a legend of the names of sizes.

    The reasons have a column where the terminal is wide enough, and stand below the table where it is not.
    """

    plan: Plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = readable_names(self.plan)
        wide = self._table(names, with_reasons=True)
        if console.measure(wide, options=options.update(max_width=UNLIMITED)).maximum <= options.max_width:
            yield wide
        else:
            yield self._table(names, with_reasons=False)
            yield from (f"{escape(label)}: {escape(reason)}" for (_, reason), label in _labels(self.plan).items())
        if names.meanings:
            yield f"[dim]{escape('; '.join(f'{name}: {meaning}' for name, meaning in names.meanings.items()))}[/]"

    def _table(self, names: Names, *, with_reasons: bool) -> Table:
        rewritten, total = len(self.plan.rewritten), len(self.plan.sites)
        table = _plain_table(f"{self.plan.model}: {rewritten} of {total} attention sites rewritten")
        table.add_column("sites", justify="right")
        for name in ("path", "tokens", "action", *(["reason"] if with_reasons else [])):
            table.add_column(name, overflow="fold")
        labels = _labels(self.plan)
        for path, number, site in _folded(self.plan):
            tokens = names.layout(site.query_layout)
            if site.key_layout != site.query_layout:
                tokens += f" (keys: {names.layout(site.key_layout)})"
            action = site.action if with_reasons else labels[site.action, site.reason]
            words = [escape(word) for word in (str(number), path, tokens, action, site.reason)]
            words[3] = f"[{'green' if site.rewritten else 'dim'}]{words[3]}[/]"
            table.add_row(*words[: len(table.columns)])
        return table


def _plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)


def _labels(plan: Plan) -> dict[tuple[str, str], str]:
    """What stands for an action and its reason: the action, numbered where it has several reasons."""
    pairs = list(dict.fromkeys((site.action, site.reason) for site in plan.sites))
    reasons = Counter(action for action, _ in pairs)
    seen: Counter[str] = Counter()
    labels = {}
    for action, reason in pairs:
        seen[action] += 1
        labels[action, reason] = action if reasons[action] == 1 else f"{action} ({seen[action]})"
    return labels


def _folded(plan: Plan) -> list[tuple[str, int, SitePlan]]:
    groups: dict[Any, list[SitePlan]] = {}
    for site in plan.sites:
        pattern = re.sub(r"\.\d+\.", ".*.", site.path)
        groups.setdefault((pattern, site.action, site.reason, site.query_layout, site.key_layout), []).append(site)
    return [(_name(sites), len(sites), sites[0]) for sites in groups.values()]


def _name(sites: list[SitePlan]) -> str:
    """`blocks.{0..11}.attn` for twelve sites, the path itself for one."""
    first = sites[0].path
    found = re.search(r"\.(\d+)\.", first)
    if len(sites) == 1 or found is None:
        return first
    numbers = [int(re.search(r"\.(\d+)\.", site.path).group(1)) for site in sites]  # type: ignore[union-attr]
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    span = f"{{{numbers[0]}..{numbers[-1]}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"
    return f"{first[: found.start()]}.{span}.{first[found.end() :]}"


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-ready data, with counts. Layouts are in readable names, which `sizes` explains."""
    names = readable_names(plan)
    return {
        "model": plan.model,
        "actions": dict(Counter(site.action for site in plan.sites)),
        "grid": plan.grid.model_dump(),
        "sizes": names.meanings,
        "sites": [
            {
                "path": site.path,
                "action": site.action,
                "reason": site.reason,
                "queries": names.layout(site.query_layout),
                "keys": names.layout(site.key_layout),
                "grid": names.grid(site.grid),
            }
            for site in plan.sites
        ],
    }


def cost_table(report: CostReport) -> RenderableType:
    """Parameters added, and a line of forward FLOPs for every picture size; first of all, where the conversion does not pay."""
    share = report.added / report.parameters
    lines = [*_warnings(report), f"{magnitude(report.added)} parameters added to {magnitude(report.parameters)} ({share:.1%})"]
    table = _plain_table("FLOPs of one forward")
    for name in ("px", "image tokens", "text tokens", "before", "after", "ratio"):
        table.add_column(name, justify="right")
    for cost in report.costs:
        style = "green" if cost.ratio >= EVEN else "red"
        sizes = (f"{cost.height} x {cost.width}", f"{cost.image:,}", f"{cost.text:,}")
        table.add_row(*sizes, magnitude(cost.before), magnitude(cost.after), f"[{style}]{cost.ratio:.2f}x[/]")
    impossible = [f"[dim]{escape(reason)}[/]" for reason in report.impossible.values()]
    return Group(*lines, *([table] if report.costs else []), *impossible)


def _warnings(report: CostReport) -> list[str]:
    losing = [cost for cost in report.costs if cost.ratio < EVEN]
    where = ", ".join(f"{c.height} x {c.width} px ({magnitude(c.before)} FLOPs before, {magnitude(c.after)} after)" for c in losing)
    return [f"[bold red]No gain at {where}.[/]{_advice(report)}"] if losing else []


def _advice(report: CostReport) -> str:
    if not report.pays_from:
        return ""
    side = report.pays_from**0.5 * report.pixels_per_token
    return f" Break-even is near {report.pays_from:,} image tokens ({side:,.0f} px square); a larger --reduction lowers it."


def magnitude(number: int) -> str:
    """A number in the unit that leaves one to three digits before the point: 93.6 M, 3.91 P."""
    value, units = float(number), ["", " K", " M", " G", " T", " P"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g}{units[0]}"


def cost_summary(report: CostReport) -> dict[str, Any]:
    """The costs as JSON-ready data, in FLOPs, sites one by one."""
    costs = [{**dataclasses.asdict(cost), "ratio": cost.ratio} for cost in report.costs]
    return {**dataclasses.asdict(report), "costs": costs}


def speed_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of one forward, teacher and student, with the quartiles of the ratio; peak memory where it was measured."""
    table = _plain_table("one forward, median of calls in turns")
    with_memory = any(row.memory for row in rows)
    for name in ("px", "teacher", "student", "speed-up", "quartiles", *(["teacher's peak", "student's peak"] if with_memory else [])):
        table.add_column(name, justify="right")
    for row in rows:
        style = "green" if row.speedup.median >= 1 else "red"
        spread = f"{row.speedup.low:.2f} .. {row.speedup.high:.2f}"
        memory = [f"{peak / 2**20:,.0f} MiB" for peak in row.memory or ()]
        ratio = f"[{style}]{row.speedup.median:.2f}x[/]"
        table.add_row(f"{row.height} x {row.width}", _ms(row.teacher), _ms(row.student), ratio, spread, *memory)
    return table


def _ms(timing: Timing) -> str:
    return f"{timing.median * 1000:,.1f} ms"


def speed_summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Timings as JSON-ready data, in seconds and bytes."""
    return [dataclasses.asdict(row) for row in rows]
