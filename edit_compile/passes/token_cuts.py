"""Cuts along a token axis in one form: whatever takes a run of tokens out of a sequence becomes a slice."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edit_compile.passes.graph_walk import argument, number, op_name, operand, remove_dead, shape_of

aten = torch.ops.aten
_KEEPS_RANGE = ("to", "_to_copy", "contiguous", "clone", "alias", "detach", "detach_")

Position = int | fx.Node | None  # along an axis, counted from its front; None for the end
CountsTokens = Callable[[Any], bool]  # may a dimension of this size be one of tokens?


@dataclass(frozen=True)
class _Run:
    """Positions start..stop along a dimension of a tensor."""

    source: fx.Node
    dim: int
    start: Position
    stop: Position


def canonicalize_cuts(graph: fx.Graph, counts_tokens: CountsTokens) -> int:
    """Rewrite in place what takes runs of tokens, such as `split`, `narrow` and indexing by a range, as slices; counts them."""
    found = 0
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            run = _run_taken(node, counts_tokens)
            if run is not None:
                node.replace_all_uses_with(_slice(run, node))
                found += 1
    if found:
        remove_dead(graph)
        graph.lint()
    return found


def _slice(run: _Run, node: fx.Node) -> fx.Node:
    args = (run.source, run.dim, run.start, run.stop)
    sliced = node.graph.call_function(aten.slice.Tensor, args)
    sliced.meta = dict(node.meta)
    return sliced


def _run_taken(node: fx.Node, counts_tokens: CountsTokens) -> _Run | None:
    """Read the run of tokens that a node takes out of a tensor; None if it does something else."""
    if node.op != "call_function":
        return None
    cut = operand(node, 0) if node.target is operator.getitem else node
    source = cut.args[0] if cut.args else None
    read = (_READERS_OF_LISTS if cut is not node else _READERS).get(op_name(cut))
    if read is None or not isinstance(source, fx.Node) or not (shape := shape_of(source)):
        return None
    dim = _dim(cut, len(shape))
    if dim is None or not counts_tokens(shape[dim]):
        return None
    if cut is node:
        return next((_Run(source, dim, start, stop) for start, stop in read(node)), None)
    index = number(node, 1)
    return next((_Run(source, dim, start, stop) for i, (start, stop) in enumerate(read(cut)) if i == index), None)


def _dim(cut: fx.Node, rank: int) -> int | None:
    """Return the dimension that is cut; None if there is not exactly one."""
    name = op_name(cut)
    if name == "index":
        given = argument(cut, 1, "indices")
        indexed = [dim for dim, index in enumerate(given) if index is not None]
        return indexed[0] if len(indexed) == 1 else None
    at = argument(cut, 1 if name in ("narrow", "index_select") else 2, "dim", 0)
    return int(at) % rank if isinstance(at, int) else None


# ------------------------------------------------------------------ the start and the stop of every piece


def _narrow(node: fx.Node) -> Iterator[tuple[Position, Position]]:
    start, length = argument(node, 2, "start"), argument(node, 3, "length")
    if isinstance(start, fx.Node) and shape_of(start) is not None:
        return
    front = add(_size(node), start) if _value(start) < 0 else start
    yield front, add(front, length)


def _index_select(node: fx.Node) -> Iterator[tuple[Position, Position]]:
    found = _range(argument(node, 2, "index"))
    if found is not None:
        yield found


def _index(node: fx.Node) -> Iterator[tuple[Position, Position]]:
    found = _range(next(index for index in argument(node, 1, "indices") if index is not None))
    if found is not None:
        yield found


def _split_with_sizes(node: fx.Node) -> Iterator[tuple[Position, Position]]:
    start: Position = 0
    for size in argument(node, 1, "split_sizes"):
        stop = add(start, size)
        yield start, stop
        start = stop


def _split(node: fx.Node) -> Iterator[tuple[Position, Position]]:
    return _equal_pieces(argument(node, 1, "split_size"), len(node.meta["val"]))


def _chunk(node: fx.Node) -> Iterator[tuple[Position, Position]]:
    count = int(argument(node, 1, "chunks"))
    size = _arithmetic(operator.floordiv, add(_size(node), count - 1), count)
    return _equal_pieces(size, len(node.meta["val"]))


def _equal_pieces(size: Any, count: int) -> Iterator[tuple[Position, Position]]:
    start: Position = 0
    for index in range(count):
        stop = add(start, size)
        yield start, stop if index < count - 1 else None
        start = stop


def _tensor_split(node: fx.Node) -> Iterator[tuple[Position, Position]]:
    places = argument(node, 1, "indices")
    if not isinstance(places, list | tuple):
        return
    yield from zip((0, *places), (*places, None), strict=True)


_READERS: dict[str, Callable[[fx.Node], Iterator[tuple[Position, Position]]]] = {
    "narrow": _narrow,
    "index_select": _index_select,
    "index": _index,
}
_READERS_OF_LISTS: dict[str, Callable[[fx.Node], Iterator[tuple[Position, Position]]]] = {
    "split_with_sizes": _split_with_sizes,
    "split": _split,
    "chunk": _chunk,
    "tensor_split": _tensor_split,
}


def _range(index: Any) -> tuple[Position, Position] | None:
    """Read the bounds of consecutive whole numbers, as `arange(n) + m` makes them."""
    if not isinstance(index, fx.Node):
        return None
    name = op_name(index)
    if name in _KEEPS_RANGE:
        return _range(index.args[0])
    if name == "add" and len(index.args) == 2 and not index.kwargs.get("alpha"):
        inner, shift = _range(index.args[0]), index.args[1]
        if inner is None or not _is_number(shift):
            return None
        return add(inner[0], shift), add(inner[1], shift)
    if name != "arange" or not all(_is_number(bound) for bound in index.args) or len(index.args) > 2:
        return None
    bounds = index.args if len(index.args) == 2 else (0, index.args[0])
    return bounds[0], bounds[1]  # type: ignore[return-value]


# ------------------------------------------------------------------ arithmetic with sizes


def _is_number(value: Any) -> bool:
    return isinstance(_value(value), int | torch.SymInt)


def _value(position: Any) -> Any:
    return position.meta.get("val") if isinstance(position, fx.Node) else position


def add(a: Any, b: Any) -> Any:
    """Add two sizes, numbers or nodes, at the graph's insertion point."""
    return b if isinstance(a, int) and a == 0 else _arithmetic(operator.add, a, b)


def _arithmetic(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    nodes = [each for each in (a, b) if isinstance(each, fx.Node)]
    if not nodes:
        return function(a, b)
    made = nodes[0].graph.call_function(function, (a, b))
    made.meta = {"val": function(_value(a), _value(b))}
    return made


def _size(cut: fx.Node) -> fx.Node | int:
    """Return the size of the dimension that a node cuts."""
    source = operand(cut, 0)
    dim = _dim(cut, len(shape_of(source) or ()))
    assert dim is not None
    return size_of(source, dim)


def size_of(source: fx.Node, dim: int) -> fx.Node | int:
    """Return a tensor's size along a dimension, at the graph's insertion point: a number if it is constant."""
    size = (shape_of(source) or ())[dim]
    if not isinstance(size, torch.SymInt):
        return int(size)
    made = source.graph.call_function(aten.sym_size.int, (source, dim))
    made.meta = {"val": size}
    return made
