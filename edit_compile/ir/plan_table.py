"""A plan as the table that `print(plan)`, notebooks and `edit-compile inspect` show: equal sites of repeated blocks in one row.

Plain text, rich's markup and HTML are spelt from the same lines; neither rich nor anything else is imported for them.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from edit_compile.ir.plan_data import PlanData, SitePlan
from edit_compile.ir.symbol_names import SymbolNames, readable_names

_GAP = "  "
_NARROWEST = 8  # characters of a column that is folded
_COLUMNS = ("sites", "path", "tokens", "action", "reason")
_GIVE_GRID = "the grid must be given: with edit_compile.grid(model, ...)"

Span = tuple[str, str]  # a text and its style, "" for none


@dataclass(frozen=True)
class Row:
    """Sites of repeated blocks that are treated alike.

    Attributes:
        sites: how many.
        path: `blocks.{0..11}.attn` for twelve sites, the path itself for one.
        tokens: the layout in readable sizes.
        action: a design's name, with those of its options that differ from site to site, or "keep".
        reason: why.
        where: for a refusal, the operation that stands in the way and its line in the model's source; "" if unknown.
        rewritten: whether the action is a design.
    """

    sites: int
    path: str
    tokens: str
    action: str
    reason: str
    where: str
    rewritten: bool


def listed(plan: PlanData) -> list[SitePlan]:
    """Return the sites that a user wants to see: attention, and feed-forward networks that are rewritten or were refused."""
    return [site for site in plan.sites if site.kind == "attention" or site.rewritten or site.refusal is not None]


def rows(plan: PlanData, names: SymbolNames | None = None) -> list[Row]:
    """Fold a plan's listed sites into rows."""
    names = names or readable_names(plan)
    sites = listed(plan)
    varying = _varying_options(sites)
    groups: dict[Any, list[SitePlan]] = defaultdict(list)
    for site in sites:
        action = " ".join([site.action, *(f"{name}={site.options.get(name)}" for name in varying[site.action])])
        pattern = re.sub(r"\.\d+\.", ".*.", site.path)
        groups[pattern, site.kind, action, site.reason, _where(site, exact=False), site.query_layout, site.key_layout].append(site)
    return [
        Row(len(group), _folded_path(group), _tokens(group[0], names), key[2], key[3], _where(group[0]), group[0].rewritten)
        for key, group in groups.items()
    ]


def headline(plan: PlanData) -> str:
    """Count what is rewritten: `SD3Transformer2DModel: 37 of 37 attention sites rewritten`."""
    counts = []
    for kind, name in (("attention", "attention sites"), ("feed_forward", "feed-forward networks")):
        sites = [site for site in plan.sites if site.kind == kind]
        number = sum(site.rewritten for site in sites)
        if kind == "attention" or number:
            counts.append(f"{number} of {len(sites)} {name}")
    return f"{plan.model}: {', '.join(counts)} rewritten"


def render(plan: PlanData) -> str:
    """Return the table as plain text, as wide as it needs to be."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in _lines(plan, None))


def markup(plan: PlanData, width: int) -> str:
    """Return the table in rich's markup, in lines of at most `width` characters."""
    return "\n".join(
        "".join(f"[{style}]{_escape(text)}[/]" if style and text else _escape(text) for text, style in line) for line in _lines(plan, width)
    )


def html(plan: PlanData) -> str:
    """Return the table as HTML, for notebooks."""
    names = readable_names(plan)

    def cells(tag: str, values: Iterable[object]) -> str:
        aligned = f'<{tag} style="text-align: left">'
        return "<tr>" + "".join(f"{aligned}{escape(str(value))}</{tag}>" for value in values) + "</tr>"

    found = rows(plan, names)
    body = "".join(cells("td", (row.sites, row.path, row.tokens, row.action, row.reason)) for row in found)
    notes = "".join(f"<div>{escape(note)}</div>" for note in (*_locations(found), *_footnotes(plan, names)))
    return f"<div><b>{escape(headline(plan))}</b><table>{cells('th', _COLUMNS)}{body}</table>{notes}</div>"


def _varying_options(sites: Iterable[SitePlan]) -> dict[str, list[str]]:
    """Name each design's options that are not the same at all of its sites."""
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for site in sites:
        for name, value in site.options.items():
            values[site.action][name].add(repr(value))
    return defaultdict(list, {action: [name for name, seen in options.items() if len(seen) > 1] for action, options in values.items()})


def _where(site: SitePlan, *, exact: bool = True) -> str:
    """Tell the refused operation and its source line; not exact: without the operation's number, which differs from block to block."""
    if site.refusal is None:
        return ""
    node = site.refusal.node if exact or site.refusal.node is None else re.sub(r"_\d+$", "", site.refusal.node)
    return ", ".join(part for part in (node, site.refusal.source) if part)


def _folded_path(sites: Sequence[SitePlan]) -> str:
    first = sites[0].path
    found = re.search(r"\.(\d+)\.", first)
    if len(sites) == 1 or found is None:
        return first
    numbers = list(dict.fromkeys(int(site.path[found.start() + 1 :].partition(".")[0]) for site in sites))
    if len(numbers) == 1:  # several computations in one module
        return first
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    span = f"{{{numbers[0]}..{numbers[-1]}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"
    return f"{first[: found.start()]}.{span}.{first[found.end() :]}"


def _tokens(site: SitePlan, names: SymbolNames) -> str:
    keys = "" if site.key_layout == site.query_layout else f" (keys: {names.layout(site.key_layout)})"
    return names.layout(site.query_layout) + keys


def _lines(plan: PlanData, width: int | None) -> Iterator[list[Span]]:
    """Yield the lines of the table. Reasons have a column where it fits, and stand below the table where it does not."""
    names = readable_names(plan)
    found = rows(plan, names)
    cells: list[tuple[str, ...]] = [(str(row.sites), row.path, row.tokens, row.action, row.reason) for row in found]
    notes: list[str] = []
    if width is not None and _total(_widths(cells)) > width:
        labels = _labels(found)
        cells = [(str(row.sites), row.path, row.tokens, labels[row.action, row.reason]) for row in found]
        notes = [f"{label}: {reason}" for (_, reason), label in labels.items()]
    yield from ([(line, "bold")] for line in _wrapped(headline(plan), width))
    yield from _table(cells, [row.rewritten for row in found], width)
    yield from ([(line, "")] for note in (*notes, *_locations(found)) for line in _wrapped(note, width))
    yield from ([(line, "dim")] for note in _footnotes(plan, names) for line in _wrapped(note, width))


def _locations(found: Iterable[Row]) -> list[str]:
    return [f"{row.path}: refused at {row.where}" for row in found if row.where]


def _footnotes(plan: PlanData, names: SymbolNames) -> list[str]:
    notes = ["; ".join(f"{name}: {meaning}" for name, meaning in names.meanings.items())] if names.meanings else []
    notes += [_GIVE_GRID] if plan.grid.kind == "given" and plan.rewritten else []
    return [*notes, f"below {plan.min_tokens:,} image tokens it runs as the original (min_tokens)"] if plan.min_tokens else notes


def _labels(found: Iterable[Row]) -> dict[tuple[str, str], str]:
    """Say what stands for an action and its reason: the action, numbered where it has several reasons."""
    pairs = list(dict.fromkeys((row.action, row.reason) for row in found))
    reasons = Counter(action for action, _ in pairs)
    seen: Counter[str] = Counter()
    labels = {}
    for action, reason in pairs:
        seen[action] += 1
        labels[action, reason] = action if reasons[action] == 1 else f"{action} ({seen[action]})"
    return labels


def _table(cells: Sequence[tuple[str, ...]], rewritten: Sequence[bool], width: int | None) -> Iterator[list[Span]]:
    widths = _widths(cells)
    while width is not None and _total(widths) > width and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    yield [(_GAP.join(_padded(name, i, widths) for i, name in enumerate(_COLUMNS[: len(widths)])), "dim")]
    for row, changed in zip(cells, rewritten, strict=True):
        folded = [_wrapped(cell, widths[i]) for i, cell in enumerate(row)]
        for number in range(max(map(len, folded))):
            parts = [_padded(lines[number] if number < len(lines) else "", i, widths) for i, lines in enumerate(folded)]
            styles = ["", "", "", "green" if changed else "dim", ""]
            yield [span for part, style in zip(parts, styles, strict=False) for span in ((part, style), (_GAP, ""))][:-1]


def _widths(cells: Iterable[tuple[str, ...]]) -> list[int]:
    cells = list(cells)
    return [max(map(len, column)) for column in zip(_COLUMNS[: len(cells[0]) if cells else None], *cells, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _padded(text: str, column: int, widths: Sequence[int]) -> str:
    if column == 0:
        return text.rjust(widths[0])
    return text if column == len(widths) - 1 else text.ljust(widths[column])


def _wrapped(text: str, width: int | None) -> list[str]:
    return [text] if width is None or len(text) <= width else textwrap.wrap(text, max(1, width), break_on_hyphens=False)


def _escape(text: str) -> str:
    """Escape a text so that rich finds no markup in it, as rich.markup.escape does."""
    escaped = re.sub(r"(\\*)(\[[a-z#/@][^[]*?])", r"\1\1\\\2", text)
    return f"{escaped}\\" if escaped.endswith("\\") and not escaped.endswith("\\\\") else escaped
