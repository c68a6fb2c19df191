"""Where a call's grids of image tokens come from: the sizes of its inputs, position ids, or what the caller states."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edit_compile.errors import GridError
from edit_compile.ir.plan import Given, Plan, PositionIds, SitePlan, SizesOfInputs
from edit_compile.ir.size_expressions import evaluator
from edit_compile.torch_internals import change_count

Sizes = tuple[int, ...]  # (h, w) or (t, h, w), in image tokens


class GridSource(Protocol):
    """The way to the grids that a plan's rewritten sites are on: one, or several where a model has several resolutions."""

    @property
    def untraceable_reason(self) -> str | None:
        """Say why torch.compile and torch.export cannot trace `sizes` without a stated grid; None if they can."""

    def index_of(self, site: SitePlan) -> int:
        """Tell which of the grids a site is on."""

    def is_base(self, index: int) -> bool:
        """Say whether a grid is the one that `edit_compile.grid` states."""

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Sizes | None) -> tuple[Sizes, ...]:
        """Work out the grids of a call.

        Args:
            stated: the base grid, as the caller stated it.

        Raises:
            GridError: the inputs do not tell, or contradict what was stated.
        """


def grid_source(plan: Plan) -> GridSource:
    """Make the source that a plan found.

    Raises:
        GridError: the plan holds an expression that is not arithmetic over its symbols.
    """
    if isinstance(plan.grid, SizesOfInputs):
        return _FromShapes(plan.grid, plan)
    return _FromIds(plan.grid) if isinstance(plan.grid, PositionIds) else _Explicit(plan.grid)


class _FromShapes:
    """Evaluates size expressions like s20//2, with s20 a dimension of an input."""

    untraceable_reason = None

    def __init__(self, source: SizesOfInputs, plan: Plan) -> None:
        self.symbols, self.base = source.symbols, tuple(source.expressions)
        self.grids = tuple(dict.fromkeys(self._expressions(site) for site in plan.rewritten))
        self.evaluators = [tuple(evaluator(e, set(source.symbols)) for e in grid) for grid in (*self.grids, self.base)]

    def _expressions(self, site: SitePlan) -> tuple[str, ...]:
        return site.grid.sizes if site.grid is not None else self.base

    def index_of(self, site: SitePlan) -> int:
        return self.grids.index(self._expressions(site))

    def is_base(self, index: int) -> bool:
        return self.grids[index] == self.base

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Sizes | None) -> tuple[Sizes, ...]:
        symbols = _symbol_sizes(self.symbols, model, args, kwargs)
        *grids, base = (tuple(size(symbols) for size in grid) for grid in self.evaluators)
        if stated is None:
            return tuple(grids)
        if not torch.compiler.is_compiling() and base != stated:
            raise GridError(f"the grid was stated as {_words(stated)}, but the inputs have {_words(base)} image tokens")
        return tuple(stated if self.is_base(i) else grid for i, grid in enumerate(grids))


class _OneGrid:
    """All sites are on the base grid."""

    def index_of(self, site: SitePlan) -> int:
        return 0

    def is_base(self, index: int) -> bool:
        return True


class _FromIds(_OneGrid):
    """Reads rows and columns off the position ids; the same ids tensor is read once."""

    def __init__(self, source: PositionIds) -> None:
        self.input = source.input
        self.read: tuple[Tensor, int, Sizes] | None = None  # replaced at once, for threads may meet here

    @property
    def untraceable_reason(self) -> str:
        return (
            f"the grid is read from the values of {self.input}, which a graph cannot hold; wrap the call in "
            "edit_compile.grid(model, height, width), or compile with edit_compile.compile(model)"
        )

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Sizes | None) -> tuple[Sizes, ...]:
        ids = _argument(model, args, kwargs, self.input)
        if stated is not None:
            _check_count(stated, ids.shape[-2])
            return (stated,)
        if torch.compiler.is_compiling() or ids.is_meta:
            raise GridError(self.untraceable_reason)
        count, read = change_count(ids), self.read
        if count is None:
            return (grid_of_ids(ids, self.input),)
        if read is None or read[0] is not ids or read[1] != count:
            self.read = read = (ids, count, grid_of_ids(ids, self.input))
        return (read[2],)


class _Explicit(_OneGrid):
    """Nothing is known but, if the plan says so, how many image tokens there are."""

    untraceable_reason = None

    def __init__(self, source: Given) -> None:
        self.symbols = source.symbols
        self.tokens = evaluator(source.tokens, set(source.symbols)) if source.tokens else None

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Sizes | None) -> tuple[Sizes, ...]:
        if stated is None:
            raise GridError(
                f"{type(model).__name__}: height and width of the image tokens do not follow from its inputs; "
                "wrap the call in edit_compile.grid(model, height, width)"
            )
        if self.tokens is not None:
            _check_count(stated, self.tokens(_symbol_sizes(self.symbols, model, args, kwargs)))
        return (stated,)


def _check_count(stated: Sizes, tokens: int) -> None:
    if not torch.compiler.is_compiling() and math.prod(stated) != tokens:
        raise GridError(f"the grid was stated as {_words(stated)} = {math.prod(stated)}, but there are {tokens} image tokens")


def _words(sizes: Sizes) -> str:
    return " x ".join(map(str, sizes))


def _symbol_sizes(
    symbols: Mapping[str, tuple[str, int]], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int]:
    found = {}
    for symbol, (name, dim) in symbols.items():
        value = _argument(model, args, kwargs, name)
        if dim >= value.ndim:
            raise GridError(f"{type(model).__name__}: {name} has {value.ndim} dimensions, not the {dim + 1} or more it was converted with")
        found[symbol] = value.shape[dim]
    return found


def _argument(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    position = _positions(type(model)).get(name, len(args))
    value = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
    if not isinstance(value, Tensor):
        raise GridError(
            f"{type(model).__name__} was called with {name}={type(value).__name__}; its grid of image tokens follows from that tensor"
        )
    return value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _positions(kind: type[nn.Module]) -> dict[str, int]:
    return {name: i - 1 for i, name in enumerate(inspect.signature(kind.forward).parameters)}


def grid_of_ids(ids: Tensor, name: str) -> tuple[int, int]:
    """Read (h, w) off position ids (N, D) or (B, N, D) whose last two columns are row and column, row-major.

    Raises:
        GridError: they are not all positions of one grid, in order.
    """
    if ids.ndim not in (2, 3) or ids.shape[-1] < 2 or not ids.shape[-2] or not ids.isfinite().all():
        raise GridError(f"{name} of shape {tuple(ids.shape)} holds no positions: (N, D) or (B, N, D) with row and column last is expected")
    rows, columns = (ids[0] if ids.ndim == 3 else ids)[:, -2:].detach().cpu().double().unbind(-1)
    height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
    place = (rows - rows.min()) * width + (columns - columns.min())
    if height * width != len(rows) or not torch.equal(place, torch.arange(len(rows), dtype=place.dtype)):
        raise GridError(
            f"{name} names {len(rows)} positions that are not a full grid in row-major order "
            f"(rows {rows.min():g}..{rows.max():g}, columns {columns.min():g}..{columns.max():g}); "
            "wrap the call in edit_compile.grid(model, height, width)"
        )
    return height, width
