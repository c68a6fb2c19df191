"""A call of an operator, as the rules of axes read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from typing import Any

from torch import Tensor, fx

from edit_compile.passes.axes.algebra import Axes, Axis, Value, axes_of, axis_size, hint, new_axis, summed, unify
from edit_compile.passes.graph_walk import op_name, operand, operands


@dataclass(frozen=True)
class Call:
    """One output of an operation in a graph.

    Attributes:
        axes: of the nodes before it.
        shape: of this output, sizes symbolic.
        output: which of the operation's outputs.
    """

    node: fx.Node
    axes: Mapping[fx.Node, Value]
    shape: tuple[Any, ...]
    output: int = 0

    @cached_property
    def first(self) -> Axes:
        """Return the first tensor's axes."""
        return axes_of(self.node.all_input_nodes[0], self.axes)

    def of(self, index: int) -> Axes:
        """Return the axes of the tensor that is a positional argument."""
        return axes_of(operand(self.node, index), self.axes)

    def listed(self, index: int) -> list[Axes]:
        """Return the axes of the tensors in the list that is a positional argument."""
        return [axes_of(each, self.axes) for each in operands(self.node, index)]

    @property
    def tensors(self) -> list[Axes]:
        """Return the axes of all operands that are one tensor."""
        return [found for each in self.node.all_input_nodes if isinstance(found := self.axes.get(each), tuple)]

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by the name that it has in the operator's schema, or what it is if left out."""
        index, otherwise = _parameters(self.node.target).get(name, (len(self.node.args), default))
        found = self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(name, otherwise)
        return default if found is None else found

    def tensor(self, name: str) -> Axes | None:
        """Return the axes of the tensor that is the argument of that name; None if it is left out or no tensor."""
        found = self.argument(name)
        axes = self.axes.get(found) if isinstance(found, fx.Node) else None
        return axes if isinstance(axes, tuple) else None

    def value(self, index: int) -> Tensor | None:
        """Return the tensor, without its numbers, that is a positional argument."""
        found = self.node.args[index] if index < len(self.node.args) else None
        value = found.meta.get("val") if isinstance(found, fx.Node) else None
        return value if isinstance(value, Tensor) else None

    def dims(self, name: str = "dim", default: Any = ()) -> set[int]:
        """Return the dimensions that are an argument, counted from the front of the first tensor."""
        found = self.argument(name, default)
        rank = max(len(self.first), 1)
        return {dim % rank for dim in (found if isinstance(found, list | tuple) else [found])}

    def dim(self, name: str = "dim", default: int = 0) -> int:
        """Return the dimension that is an argument, counted from the front of the first tensor."""
        return int(self.argument(name, default)) % max(len(self.first), 1)

    def position(self, name: str, default: int, length: int) -> int:
        """Return an argument that is a place along an axis of this length, in the example."""
        found = self.argument(name)
        at = default if found is None else size_of(found)
        return max(0, at + length if at < 0 else min(at, length))


Rule = Callable[[Call], Axes]


@cache
def _parameters(target: Any) -> dict[str, tuple[int, Any]]:
    """Return, by name, where an operator's parameters stand and what they are if left out."""
    schema = getattr(target, "_schema", None)
    arguments = schema.arguments if schema is not None else ()
    return {each.name: (index, each.default_value) for index, each in enumerate(arguments)}


def size_of(found: Any) -> int:
    """Return the example's value of an argument that is a number or a node of one."""
    return hint(found.meta["val"]) if isinstance(found, fx.Node) else hint(found)


def aligned(shape: tuple[Any, ...], tensors: list[Axes], merge: Callable[[Axis, Axis], Axis] = unify) -> Axes:
    """Align dimensions from the right, as broadcasting does."""
    result: list[Axis] = []
    for from_right in range(len(shape), 0, -1):
        size = hint(shape[-from_right])
        found = [t[-from_right] for t in tensors if len(t) >= from_right and axis_size(t[-from_right]) == size]
        result.append(reduce(merge, found) if found else new_axis(shape[-from_right]))
    return tuple(result)


_SUMS = frozenset("add add_ sub sub_ subtract rsub addcmul addcmul_ addcdiv addcdiv_ lerp lerp_".split())  # noqa: SIM905


def same_positions(call: Call) -> Axes:
    """Compute every number from those at its place: dimensions are aligned from the right, size 1 broadcasts."""
    return aligned(call.shape, call.tensors, summed if op_name(call.node) in _SUMS else unify)
