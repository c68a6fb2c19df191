"""Readable names for the symbolic sizes of a plan: `image h*w, text t` where the graph says `image ((s20//2))*((s33//2)), text s31`."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from edit_compile.ir.plan_data import PlanData, SitePlan
from edit_compile.ir.tokens import Grid, Segment, TokenKind, TokenLayout

AXES = {2: ("h", "w"), 3: ("f", "h", "w")}  # video has frames before rows and columns
MEANINGS = {"f": "frames", "h": "rows of image tokens", "w": "columns of image tokens"}
LENGTHS = {TokenKind.IMAGE: ("n", "image tokens"), TokenKind.TEXT: ("t", "text tokens"), TokenKind.OTHER: ("r", "other tokens")}


@dataclass(frozen=True)
class SymbolNames:
    """Names for size expressions.

    Attributes:
        by_expression: name of each expression in canonical spelling.
        meanings: what each name stands for.
    """

    by_expression: dict[str, str] = field(default_factory=dict)
    meanings: dict[str, str] = field(default_factory=dict)

    def add(self, expression: str, name: str, meaning: str) -> str:
        """Name an expression unless it has a name or is a number; append a number to a name that is taken."""
        key = _canonical(expression)
        if key.isdigit():
            return key
        if key not in self.by_expression:
            free = next(n for n in itertools.chain([name], map(f"{name}{{}}".format, itertools.count(2))) if n not in self.meanings)
            self.by_expression[key], self.meanings[free] = free, meaning
        return self.by_expression[key]

    def of(self, expression: str) -> str:
        """Return the expression with each named part replaced with its name."""
        tree = _parsed(expression)
        return expression if tree is None else ast.unparse(_Renamed(self.by_expression).visit(tree)).replace(" * ", "*")

    def layout(self, layout: TokenLayout) -> str:
        """Spell a layout: `image h*w, text t`."""
        return ", ".join(f"{segment.kind} {self.of(segment.length)}" for segment in layout.segments)

    def grid(self, grid: Grid | None) -> str | None:
        """Spell a grid: `h x w`."""
        return " x ".join(map(self.of, grid.sizes)) if grid is not None else None


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit(self, node: ast.AST) -> ast.AST:
        name = self.names.get(ast.unparse(node))
        return ast.Name(name) if name is not None else self.generic_visit(node)


def _parsed(expression: str) -> ast.expr | None:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError:
        return None


def _canonical(expression: str) -> str:
    tree = _parsed(expression)
    return expression if tree is None else ast.unparse(tree)


def readable_names(plan: PlanData) -> SymbolNames:
    """Name the sizes in a plan: h and w for the grid (f for frames), t for text tokens, n and r for image and other tokens.

    The model's own grid is named first; sites on another grid get h2, w2 and so on.
    """
    names = SymbolNames()
    grids = [Grid(plan.grid.expressions)] if plan.grid.kind == "sizes" and any(site.grid is not None for site in plan.sites) else []
    for grid in dict.fromkeys([*grids, *(site.grid for site in plan.sites if site.grid is not None)]):
        if len(grid.sizes) in AXES:
            _name_grid(names, grid, plan)
    for segment in _segments(plan.sites):
        if segment.kind is TokenKind.IMAGE and plan.grid.kind == "ids" and segment.length.isidentifier():
            names.by_expression.setdefault(segment.length, "h*w")
            names.meanings.update({name: f"{MEANINGS[name]}, read from {plan.grid.input}" for name in AXES[2]})
        for symbol in _unnamed_symbols(names.of(segment.length), names):
            names.add(symbol, *LENGTHS[segment.kind])
    return names


def _name_grid(names: SymbolNames, grid: Grid, plan: PlanData) -> None:
    own = [names.add(size, name, _meaning(name, size, plan)) for name, size in zip(AXES[len(grid.sizes)], grid.sizes, strict=True)]
    if any(name.isdigit() for name in own):
        return
    for order in itertools.permutations(range(len(own))):
        product = _canonical("*".join(f"({grid.sizes[i]})" for i in order))
        names.by_expression.setdefault(product, "*".join(own))


def _meaning(name: str, expression: str, plan: PlanData) -> str:
    """Say what a grid's name stands for: rows of image tokens, hidden_states.shape[2] // 2."""
    symbols = {} if plan.grid.kind == "ids" else plan.grid.symbols
    shapes = {symbol: argument if dim is None else f"{argument}.shape[{dim}]" for symbol, (argument, dim) in symbols.items()}
    known = SymbolNames(shapes).of(expression)
    return MEANINGS[name] if known == SymbolNames().of(expression) else f"{MEANINGS[name]}, {known}"


def _segments(sites: Iterable[SitePlan]) -> Iterator[Segment]:
    for site in sites:
        yield from (*site.query_layout.segments, *site.key_layout.segments)


def _unnamed_symbols(expression: str, names: SymbolNames) -> list[str]:
    tree = _parsed(expression)
    found = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)] if tree is not None else []
    return [name for name in dict.fromkeys(found) if not any(name in readable.split("*") for readable in names.by_expression.values())]
