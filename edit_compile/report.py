"""What users read: the plan as a table and in words."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.markup import escape
from rich.table import Table

from edit_compile.plans import Plan, SitePlan


def plan_table(plan: Plan) -> Table:
    """The plan, sites of repeated blocks that are treated alike in one row."""
    table = Table(title=f"{plan.model}: {len(plan.rewritten)} of {len(plan.sites)} attention sites rewritten", title_justify="left")
    table.add_column("site", overflow="fold")
    for name in ("number", "queries", "keys", "action", "reason"):
        table.add_column(name, justify="right" if name == "number" else "left", overflow="fold")
    for name, number, site in _folded(plan):
        keys = "the same" if site.key_layout == site.query_layout else str(site.key_layout)
        style = "green" if site.rewritten else "dim"
        table.add_row(*map(escape, (name, str(number), str(site.query_layout), keys)), f"[{style}]{site.action}[/]", escape(site.reason))
    return table


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
    """The plan as JSON-ready data, with counts."""
    return {
        "model": plan.model,
        "actions": dict(Counter(site.action for site in plan.sites)),
        "grid": plan.grid.model_dump(),
        "sites": [
            {
                "path": site.path,
                "action": site.action,
                "reason": site.reason,
                "queries": str(site.query_layout),
                "keys": str(site.key_layout),
            }
            for site in plan.sites
        ],
    }
