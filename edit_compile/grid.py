"""Publishing the image tokens' grid to the sites, for the duration of a forward.

The model's forward pre-hook works out (h, w) from its inputs; sites read it as the shape of a zero-stride tensor,
which torch.compile keeps symbolic where integers on a module would recompile at every resolution. No globals.
"""

from __future__ import annotations

import ast
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.errors import EditCompileError, GridError
from edit_compile.plans import PositionIds, SizesOfInputs

RUNTIME = "edit_runtime"


class Runtime:
    """What a converted model and its sites share: the forward's grid, and whether the teacher is on."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.grid: Tensor | None = None
        self.given: tuple[int, int] | None = None
        self.teaching = False
        self.measure = _measure_from(source)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        copied = Runtime(self.source)
        copied.given, copied.teaching = self.given, self.teaching
        memo[id(self)] = copied
        return copied

    def current_grid(self, site: nn.Module) -> Tensor:
        if self.grid is None:
            raise GridError(
                f"{site.edit_path} ran outside the model's forward, where the grid of its image tokens is not known; "
                "call the whole model, or wrap the call in edit_compile.grid(model, height, width)"
            )
        return self.grid


def publish_with(model: nn.Module, runtime: Runtime) -> None:
    """Let the model's forward publish its grid."""
    from torch._dynamo.eval_frame import skip_code  # capture has loaded it; importing this package must not

    skip_code(_Publish.__call__.__code__)
    setattr(model, RUNTIME, runtime)
    model.register_forward_pre_hook(_Publish(runtime), with_kwargs=True)
    model.register_forward_hook(_Withdraw(runtime))


class _Publish:
    """The pre-hook. torch.compile may meet it in two ways: traced as part of an outer model, it belongs to the graph;
    called on its own before the compiled forward, it must run eagerly, or its sizes would be constants of a graph.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or torch.compiler.is_compiling():
            _publish(self.runtime, model, args, kwargs)
        else:
            dynamo.disable(_publish)(self.runtime, model, args, kwargs)


def _publish(runtime: Runtime, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not runtime.teaching:
        like = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        height, width = runtime.given or runtime.measure(model, args, kwargs)
        runtime.grid = as_grid(height, width, like)


class _Withdraw:
    """After the forward the grid goes, except that checkpointed blocks run again in backward and need it then."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        runtime, grid = self.runtime, self.runtime.grid
        runtime.grid = None
        if grid is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return output
        return pytree.tree_map(lambda leaf: _Republish.apply(leaf, runtime, grid) if _differentiable(leaf) else leaf, output)


class _Republish(torch.autograd.Function):
    """The identity; its backward, the first of the model's, publishes the grid of the forward it belongs to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runtime: Runtime, grid: Tensor) -> Tensor:
        ctx.runtime, ctx.grid = runtime, grid
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.runtime.grid = ctx.grid
        return gradient, None, None


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def as_grid(height: int, width: int, like: Tensor) -> Tensor:
    """A grid as the shape of a tensor without content."""
    shape = like.new_empty((1, 1)).detach().expand(height, width)
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not torch.compiler.is_compiling():
        dynamo.maybe_mark_dynamic(shape, [0, 1])  # symbolic from the first graph on
    return shape


def runtime_of(model: nn.Module) -> Runtime:
    """The converted model's runtime.

    Raises:
        EditCompileError: the model was not converted.
    """
    runtime = getattr(model, RUNTIME, None)
    if not isinstance(runtime, Runtime):
        raise EditCompileError(f"{type(model).__name__} is not converted; linearize(model) gives a converted copy")
    return runtime


@contextmanager
def grid(model: nn.Module, height: int, width: int) -> Iterator[None]:
    """State the grid of image tokens for the forwards inside, where it does not follow from the inputs or must not be
    read from them (position ids under torch.compile and torch.export).

    Args:
        height, width: in image tokens.
    """
    if height < 1 or width < 1:
        raise GridError(f"a grid of {height} x {width} has no tokens")
    runtime = runtime_of(model)
    before = runtime.given
    runtime.given = (height, width)
    try:
        yield
    finally:
        runtime.given = before


def _measure_from(source: Any) -> Callable[..., tuple[int, int]]:
    if isinstance(source, SizesOfInputs):
        return _FromSizes(source)
    return _FromIds(source) if isinstance(source, PositionIds) else _unknown


def _unknown(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    raise GridError(
        f"{type(model).__name__}: height and width of the image tokens do not follow from its inputs; "
        "wrap the call in edit_compile.grid(model, height, width)"
    )


def _argument(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    if name in kwargs:
        return kwargs[name]
    position = _positions(type(model)).get(name, len(args))
    if position >= len(args):
        raise GridError(f"{type(model).__name__} was called without {name}, from which its grid of image tokens follows")
    return args[position]


@torch.compiler.assume_constant_result
def _positions(kind: type[nn.Module]) -> dict[str, int]:
    return {name: i - 1 for i, name in enumerate(inspect.signature(kind.forward).parameters)}


class _FromSizes:
    """Evaluates size expressions such as s20//2, s20 being a dimension of an input."""

    def __init__(self, source: SizesOfInputs) -> None:
        self.source = source
        self.height, self.width = (evaluator(e, set(source.symbols)) for e in source.expressions)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        sizes = {s: _argument(model, args, kwargs, name).shape[dim] for s, (name, dim) in self.source.symbols.items()}
        return self.height(sizes), self.width(sizes)


class _FromIds:
    """Reads rows and columns off the position ids; the same ids tensor is read once."""

    def __init__(self, source: PositionIds) -> None:
        self.source = source
        self.seen: tuple[Any, tuple[int, int]] | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        ids = _argument(model, args, kwargs, self.source.input)
        if torch.compiler.is_compiling() or ids.is_meta:
            raise GridError(
                f"the grid is read from {self.source.input}, which a compiled or exported model cannot do; wrap the call in "
                "edit_compile.grid(model, height, width), or compile with edit_compile.compile(model)"
            )
        key = (ids.data_ptr(), ids._version, tuple(ids.shape))
        if self.seen is None or self.seen[0] != key:
            self.seen = (key, grid_of_ids(ids, self.source.input))
        return self.seen[1]


def grid_of_ids(ids: Tensor, name: str) -> tuple[int, int]:
    """(h, w) of position ids (N, D) or (B, N, D) whose last two columns are row and column, row-major.

    Raises:
        GridError: they are not all positions of one grid, in order.
    """
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


_OPERATORS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}


def evaluator(expression: str, symbols: set[str]) -> Callable[[Mapping[str, int]], int]:
    """An arithmetic expression over sizes as a function of them. Nothing but + - * // , numbers and symbols is accepted.

    Raises:
        GridError: anything else is in it.
    """
    try:
        return _compiled(ast.parse(expression, mode="eval").body, symbols)
    except (SyntaxError, KeyError) as error:
        raise GridError(f"{expression!r} is no size expression over {sorted(symbols)}: {error}") from None


def _compiled(node: ast.AST, symbols: set[str]) -> Callable[[Mapping[str, int]], int]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        number = node.value
        return lambda sizes: number
    if isinstance(node, ast.Name) and node.id in symbols:
        name = node.id
        return lambda sizes: sizes[name]
    if isinstance(node, ast.BinOp):
        apply, left, right = _OPERATORS[type(node.op)], _compiled(node.left, symbols), _compiled(node.right, symbols)
        return lambda sizes: apply(left(sizes), right(sizes))
    if isinstance(node, ast.UnaryOp):
        apply_one, operand = _OPERATORS[type(node.op)], _compiled(node.operand, symbols)
        return lambda sizes: apply_one(operand(sizes))
    raise KeyError(ast.dump(node))
