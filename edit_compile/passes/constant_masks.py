"""Masks that depend on no input but its sizes: what they hold, computed at the example's sizes and at others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from edit_compile.errors import GridError
from edit_compile.ir.size_expressions import evaluator, symbols_in
from edit_compile.passes.axes.algebra import expression, hint
from edit_compile.torch_internals import writes_into_operand

_SCALES = (1, 2, 8)  # of the example's sizes
_MOST_NUMBERS = 1 << 25  # in one tensor
_SMALLER = (2, 4, 8, 16, 32)  # what the example's sizes are divided by if the mask is too large there

Sizes = Mapping[str, int]


def computed_masks(mask: fx.Node, reader: fx.Node) -> Iterator[Tensor]:
    """Yield a mask's values at several sizes, as `reader` finds them; nothing if they depend on an input's values, a weight or chance."""
    steps = _steps(mask, reader)
    hints = _hints(mask.graph, steps) if steps is not None else None
    if steps is None or hints is None:
        return
    for sizes in _other_sizes(steps, hints):
        found = _run(steps, sizes)
        if found is None:
            return
        yield found[mask]


def _steps(mask: fx.Node, reader: fx.Node) -> list[fx.Node] | None:
    """List what a mask is computed by, writes into it before it is read included, in order; None if it depends on more than sizes."""
    found: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        if not _is_free(node):
            return None
        found.add(node)
        if not _is_size(node):
            pending += [*node.all_input_nodes, *(user for user in node.users if _touches(user) and user < reader)]
    return [node for node in mask.graph.nodes if node in found]


def _touches(node: fx.Node) -> bool:
    """Say whether a node writes into its operand, or lets others do so."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", [])
    return writes_into_operand(node.target) or any(each.alias_info is not None for each in returns)


def _is_free(node: fx.Node) -> bool:
    """Say whether a node's value follows from sizes, if those of its operands do."""
    if _is_size(node):
        return True
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and not random


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt) and node.op == "call_function"


def _hints(graph: fx.Graph, steps: list[fx.Node]) -> dict[str, int] | None:
    """Map every symbol that the sizes are made of to its value in the example; None if one cannot be told."""
    needed = {name for node in steps for size in _sizes_at(node) for name in symbols_in(expression(size))}
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and needed:
            found |= {expression(size): hint(size) for size in _sizes_at(node) if expression(size) in needed}
    return found if needed <= set(found) else None


def _sizes_at(node: fx.Node) -> list[Any]:
    """List the sizes that a node's value has, or the size that it is."""
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else [value] if isinstance(value, int | torch.SymInt) else []


def _other_sizes(steps: list[fx.Node], hints: Sizes) -> Iterator[Sizes]:
    """Yield the example's sizes and multiples of them at which no tensor is too large; smaller ones where they all are."""
    wanted = [{name: size * scale for name, size in hints.items()} for scale in (_SCALES if hints else (1,))]
    fitting = [sizes for sizes in wanted if _fits(steps, sizes)]
    if not fitting:
        smaller = [{n: s // by for n, s in hints.items()} for by in _SMALLER if all(s % by == 0 and s > by for s in hints.values())]
        fitting = [sizes for sizes in smaller if _fits(steps, sizes)]
    yield from fitting


def _fits(steps: list[fx.Node], sizes: Sizes) -> bool:
    try:
        return all(math.prod(_size(each, sizes) for each in _sizes_at(node)) <= _MOST_NUMBERS for node in steps)
    except GridError:
        return False


def _run(steps: list[fx.Node], sizes: Sizes) -> dict[fx.Node, Any] | None:
    """Compute the nodes on the CPU; None where that is not possible."""
    values: dict[fx.Node, Any] = {}
    try:
        for node in steps:
            values[node] = _size(node.meta["val"], sizes) if _is_size(node) else _called(node, values)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, GridError):
        return None
    return values


def _size(size: Any, sizes: Sizes) -> int:
    return evaluator(expression(size), set(sizes))(sizes)


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda each: values[each])
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    args = tuple("cpu" if isinstance(each, torch.device) else each for each in args)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)
