"""Working out the image tokens' (h, w) from a forward's inputs: from their sizes, or from position ids."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edit_compile.errors import GridError
from edit_compile.ir.plan import Given, PositionIds, SizesOfInputs
from edit_compile.ir.size_expressions import evaluator

Source = SizesOfInputs | PositionIds | Given


def measure_from(source: Source) -> Measure:
    """The way to the grid that a plan found."""
    if isinstance(source, SizesOfInputs):
        return _FromSizes(source)
    return _FromIds(source) if isinstance(source, PositionIds) else _Unknown(source)


class Measure(Protocol):
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """(h, w) of a forward's image tokens.

        Raises:
            GridError: the inputs do not tell.
        """

    def check(self, height: int, width: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Whether a stated grid can be that of these inputs.

        Raises:
            GridError: it cannot.
        """

    @property
    def obstacle(self) -> str | None:
        """Why torch.compile and torch.export cannot trace the measuring; None if they can."""


class _Unknown:
    """Nothing is known but, if the plan says so, how many image tokens there are."""

    obstacle = None

    def __init__(self, source: Given) -> None:
        self.source = source
        self.tokens = evaluator(source.tokens, set(source.symbols)) if source.tokens else None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        raise GridError(
            f"{type(model).__name__}: height and width of the image tokens do not follow from its inputs; "
            "wrap the call in edit_compile.grid(model, height, width)"
        )

    def check(self, height: int, width: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.tokens is not None:
            _check_count(height, width, self.tokens(_sizes(self.source.symbols, model, args, kwargs)))


class _FromSizes:
    """Evaluates size expressions such as s20//2, s20 being a dimension of an input."""

    obstacle = None

    def __init__(self, source: SizesOfInputs) -> None:
        self.source = source
        self.height, self.width = (evaluator(e, set(source.symbols)) for e in source.expressions)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        sizes = _sizes(self.source.symbols, model, args, kwargs)
        return self.height(sizes), self.width(sizes)

    def check(self, height: int, width: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = self(model, args, kwargs)
        if found != (height, width):
            raise GridError(f"the grid was stated as {height} x {width}, but the inputs have {found[0]} x {found[1]} image tokens")


class _FromIds:
    """Reads rows and columns off the position ids; the same ids tensor is read once."""

    def __init__(self, source: PositionIds) -> None:
        self.source = source
        self.seen: tuple[Tensor, int, tuple[int, int]] | None = None

    @property
    def obstacle(self) -> str:
        return (
            f"the grid is read from the values of {self.source.input}, which a graph cannot hold; wrap the call in "
            "edit_compile.grid(model, height, width), or compile with edit_compile.compile(model)"
        )

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        ids = _argument(model, args, kwargs, self.source.input)
        if torch.compiler.is_compiling() or ids.is_meta:
            raise GridError(self.obstacle)
        if ids.is_inference():  # such tensors do not count their changes
            return grid_of_ids(ids, self.source.input)
        if self.seen is None or self.seen[0] is not ids or self.seen[1] != ids._version:
            self.seen = (ids, ids._version, grid_of_ids(ids, self.source.input))
        return self.seen[2]

    def check(self, height: int, width: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        _check_count(height, width, _argument(model, args, kwargs, self.source.input).shape[-2])


def _check_count(height: int, width: int, tokens: int) -> None:
    if height * width != tokens:
        raise GridError(f"the grid was stated as {height} x {width} = {height * width}, but there are {tokens} image tokens")


def _sizes(symbols: Mapping[str, tuple[str, int]], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
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


@torch.compiler.assume_constant_result
def _positions(kind: type[nn.Module]) -> dict[str, int]:
    return {name: i - 1 for i, name in enumerate(inspect.signature(kind.forward).parameters)}


def grid_of_ids(ids: Tensor, name: str) -> tuple[int, int]:
    """(h, w) of position ids (N, D) or (B, N, D) whose last two columns are row and column, row-major.

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
