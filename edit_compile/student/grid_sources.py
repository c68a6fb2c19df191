"""Where a call's grids of image tokens come from: the sizes of its inputs, position ids, or what the caller states."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edit_compile.designs.ops.token_spans import in_words
from edit_compile.errors import GridError
from edit_compile.ir.plan import Given, Plan, PositionIds, SitePlan, SizesOfInputs
from edit_compile.ir.plan_data import SizeAt
from edit_compile.ir.position_ids import Sizes, grids_of_ids
from edit_compile.ir.size_expressions import Evaluator, evaluator
from edit_compile.torch_internals import change_count

Grids = tuple[Sizes, ...]  # of the image, or of several images in one sequence

_STATE_IT = "wrap the call in edit_compile.grid(model, height, width), or edit_compile.grid(model, (h1, w1), (h2, w2)) for several images"


class GridSource(Protocol):
    """The way to the grids that a plan's rewritten sites are on: one, or several where a model has several resolutions."""

    @property
    def untraceable_reason(self) -> str | None:
        """Say why torch.compile and torch.export cannot trace `sizes` without a stated grid; None if they can."""

    def index_of(self, site: SitePlan) -> int:
        """Tell which of the grids a site is on."""

    def is_base(self, index: int) -> bool:
        """Say whether a grid is the one that `edit_compile.grid` states."""

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Grids | None) -> tuple[Grids, ...]:
        """Work out the grids of a call.

        Args:
            stated: the base grid, as the caller stated it; of several images, the grid of each.

        Raises:
            GridError: the inputs do not tell, or contradict what was stated.
        """


def grid_source(plan: Plan) -> GridSource:
    """Make the source that a plan found.

    Raises:
        GridError: the plan holds an expression that is not arithmetic over its symbols.
    """
    if isinstance(plan.grid, SizesOfInputs):
        return _FromSizes(plan.grid, plan)
    return _FromIds(plan.grid) if isinstance(plan.grid, PositionIds) else _Explicit(plan.grid)


class _FromSizes:
    """Evaluates size expressions like s20//2, with s20 a dimension of an input, or a number among the inputs."""

    untraceable_reason = None

    def __init__(self, source: SizesOfInputs, plan: Plan) -> None:
        self.base = tuple(source.expressions)
        self.grids = tuple(dict.fromkeys(self._expressions(site) for site in plan.rewritten))
        self.evaluators = [tuple(evaluator(e, set(source.symbols)) for e in grid) for grid in (*self.grids, self.base)]
        self.symbols = _Symbols(source.symbols, source.images)
        self.samples = [_Samples(group, source.symbols) for group in source.samples]

    def _expressions(self, site: SitePlan) -> tuple[str, ...]:
        return site.grid.sizes if site.grid is not None else self.base

    def index_of(self, site: SitePlan) -> int:
        return self.grids.index(self._expressions(site))

    def is_base(self, index: int) -> bool:
        return self.grids[index] == self.base

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Grids | None) -> tuple[Grids, ...]:
        images = self.symbols.read(model, args, kwargs)
        for samples in self.samples:
            samples.check(model, args, kwargs)
        *grids, base = (tuple(tuple(size(symbols) for size in grid) for symbols in images) for grid in self.evaluators)
        if stated is None:
            return tuple(grids)
        if not torch.compiler.is_compiling() and base != stated:
            raise GridError(f"the grid was stated as {in_words(stated)}, but the inputs have {in_words(base)} image tokens")
        return tuple(stated if self.is_base(i) else grid for i, grid in enumerate(grids))


class _OneGrid:
    """All sites are on the base grid."""

    def index_of(self, site: SitePlan) -> int:
        return 0

    def is_base(self, index: int) -> bool:
        return True


class _FromIds(_OneGrid):
    """Reads frames, rows and columns off the position ids; the same ids tensor is read once."""

    def __init__(self, source: PositionIds) -> None:
        self.source, self.ids, self.symbols = source, _Input(source.input), _Symbols(source.symbols)
        self.before = evaluator(source.before, set(source.symbols))
        self.tokens = evaluator(source.tokens, set(source.symbols)) if source.tokens is not None else None
        self.last: tuple[Tensor, int, int, int, Grids] | None = None  # what was read; replaced at once, for threads may meet here

    @property
    def untraceable_reason(self) -> str:
        return (
            f"the grid is read from the values of {self.source.input}, which a graph cannot hold; wrap the call in "
            "edit_compile.grid(model, height, width), or compile with edit_compile.compile(model)"
        )

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Grids | None) -> tuple[Grids, ...]:
        ids = self.ids.tensor(model, args, kwargs)
        start, length = self._image(ids, model, args, kwargs)
        if stated is not None:
            _check_count(stated, length)
            return (stated,)
        if torch.compiler.is_compiling() or ids.is_meta:
            raise GridError(self.untraceable_reason)
        count, last = change_count(ids), self.last
        if count is None:
            return (self._read(ids, start, length),)
        if last is None or last[0] is not ids or last[1:4] != (count, start, length):
            self.last = last = (ids, count, start, length, self._read(ids, start, length))
        return (last[4],)

    def _image(self, ids: Tensor, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Tell where the image tokens' ids begin, and how many there are."""
        if ids.ndim not in (2, 3):
            raise GridError(f"{self.source.input} of shape {tuple(ids.shape)} holds no positions of tokens; {_STATE_IT}")
        if self.tokens is None:
            return 0, ids.shape[-1 if self.source.tokens_last else -2]
        symbols = self.symbols.read(model, args, kwargs)[0]
        return self.before(symbols), self.tokens(symbols)

    def _read(self, ids: Tensor, start: int, length: int) -> Grids:
        by_token = ids.transpose(-2, -1) if self.source.tokens_last else ids
        return grids_of_ids(by_token[..., start : start + length, :], self.source.input, self.source.rows_and_columns)


class _Explicit(_OneGrid):
    """Nothing is known but, if the plan says so, how many image tokens there are."""

    untraceable_reason = None

    def __init__(self, source: Given) -> None:
        self.symbols = _Symbols(source.symbols)
        self.tokens: Evaluator | None = evaluator(source.tokens, set(source.symbols)) if source.tokens else None

    def sizes(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Grids | None) -> tuple[Grids, ...]:
        if stated is None:
            raise GridError(
                f"{type(model).__name__}: height and width of the image tokens do not follow from its inputs; "
                "wrap the call in edit_compile.grid(model, height, width)"
            )
        if self.tokens is not None:
            _check_count(stated, self.tokens(self.symbols.read(model, args, kwargs)[0]))
        return (stated,)


def _check_count(stated: Grids, tokens: int) -> None:
    total = sum(math.prod(sizes) for sizes in stated)
    if not torch.compiler.is_compiling() and total != tokens:
        raise GridError(f"the grid was stated as {in_words(stated)} = {total}, but there are {tokens} image tokens")


# ------------------------------------------------------------------ reading inputs

_STEP = re.compile(r"\[(\d+)\]|\['([^']*)'\]")


class _Input:
    """An input of a call, as a plan names it: `x`, `pictures[0]`, `sizes['image'][1]`.

    Raises:
        GridError: it is not named so.
    """

    def __init__(self, path: str) -> None:
        found = re.fullmatch(r"([^\[\]]+)((\[\d+\]|\['[^']*'\])*)", path)
        if found is None:
            raise GridError(f"{path!r} does not name an input")
        self.path, self.name = path, found[1]
        self.steps: tuple[int | str, ...] = tuple(int(i) if i else key for i, key in _STEP.findall(found[2]))

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Find its value; None if the call has none."""
        position = _positions(type(model)).get(self.name, len(args))
        value: Any = kwargs[self.name] if self.name in kwargs else args[position] if position < len(args) else None
        for step in self.steps:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def tensor(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Find its value, a tensor.

        Raises:
            GridError: it is none.
        """
        value = self.read(model, args, kwargs)
        if not isinstance(value, Tensor):
            raise _not_a_tensor(value, self.path, model)
        return value


class _Symbols:
    """Reads the sizes that expressions are over: dimensions of tensors, and numbers, those of each image where inputs list them."""

    def __init__(self, symbols: Mapping[str, SizeAt], images: str | None = None) -> None:
        self.images = _Input(images) if images is not None else None
        below = {name: path for name, (path, dim) in symbols.items() if dim is None and path.startswith(f"{images}[")}
        self.of_images = {name: _Input(path).steps[-1] for name, path in below.items()}
        self.others = {name: (_Input(path), dim) for name, (path, dim) in symbols.items() if name not in below}

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[dict[str, int]]:
        """Read the symbols of a call, those of each image where there are several.

        Raises:
            GridError: an input is not there, or of another form than at conversion.
        """
        found = {name: _size(at.read(model, args, kwargs), at.path, dim, model) for name, (at, dim) in self.others.items()}
        if self.images is None:
            return [found]
        listed = self.images.read(model, args, kwargs)
        return [found | self._of_image(sizes, model) for sizes in (listed if _is_nested(listed) else [listed])]

    def _of_image(self, sizes: Any, model: nn.Module) -> dict[str, int]:
        assert self.images is not None
        if not isinstance(sizes, Sequence) or any(not isinstance(i, int) or i >= len(sizes) for i in self.of_images.values()):
            raise GridError(
                f"{type(model).__name__} was called with {sizes!r} in {self.images.path}; the sizes of its images are read there: "
                "frames, height and width as at conversion"
            )
        return {name: _size(sizes[i], f"{self.images.path}[{i}]", None, model) for name, i in self.of_images.items() if isinstance(i, int)}


class _Samples:
    """The images of one batch, each a tensor of its own: one grid is read, so all must have one size."""

    def __init__(self, group: tuple[str, ...], symbols: Mapping[str, SizeAt]) -> None:
        self.inputs = [_Input(path) for path in group]
        held = (*group, *(f"{path}[" for path in group))
        self.dims = sorted({dim for path, dim in symbols.values() if dim is not None and (path in group or path.startswith(held))})

    def check(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compare the images of a call.

        Raises:
            GridError: they have several sizes.
        """
        values = [(each.path, each.read(model, args, kwargs)) for each in self.inputs]
        listed = [(path, value) for path, found in values for value in (found if isinstance(found, Sequence) else [found])]
        sizes = [tuple(_size(value, path, dim, model) for dim in self.dims) for path, value in listed if value is not None]
        other = next((each for each in sizes if each != sizes[0]), None)
        if other is not None:
            where, both = ", ".join(path for path, _ in values), f"{in_words((sizes[0],))} and {in_words((other,))}"
            raise GridError(
                f"{type(model).__name__}: the images in {where} are of several sizes, {both}; a call has one grid of image tokens, so "
                "call the model once for every size"
            )


def _is_nested(listed: Any) -> bool:
    return isinstance(listed, Sequence) and len(listed) > 0 and all(isinstance(sizes, Sequence) for sizes in listed)


def _size(value: Any, path: str, dim: int | None, model: nn.Module) -> int:
    kind = type(model).__name__
    if dim is None:
        if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
            raise GridError(f"{kind} was called with {path}={value!r}; its grid of image tokens follows from that number")
        return value  # type: ignore[return-value]
    if not isinstance(value, Tensor):
        raise _not_a_tensor(value, path, model)
    if dim >= value.ndim:
        raise GridError(f"{kind}: {path} has {value.ndim} dimensions, not the {dim + 1} or more it was converted with")
    return value.shape[dim]


def _not_a_tensor(value: Any, path: str, model: nn.Module) -> GridError:
    called = f"{type(model).__name__} was called with {path}={type(value).__name__}"
    return GridError(f"{called}; its grid of image tokens follows from that tensor")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _positions(kind: type[nn.Module]) -> dict[str, int]:
    return {name: i - 1 for i, name in enumerate(inspect.signature(kind.forward).parameters)}
