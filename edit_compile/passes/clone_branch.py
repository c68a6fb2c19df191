"""A lane: the way from a changed node to a target, emitted again beside the original.

The query's lane runs on the same tokens. The key's and value's lanes run on fewer: sizes along the token axis
follow, and tables by token that join the lane (RoPE, masks) are sampled on the compressed grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edit_compile.designs.ops.token_spans import sample_axis
from edit_compile.errors import RewriteError
from edit_compile.passes.axes.algebra import Axis, Value, axis_size, hint, shape_of
from edit_compile.passes.op_traits import name_of

aten = torch.ops.aten
IMAGE = "image"
_SIZED_AS_A_WHOLE = ("view", "reshape", "_unsafe_view", "expand")
_CUTS = ("split", "split_with_sizes", "chunk", "unbind", "select", "unflatten", "narrow")


def is_image(axis: Axis) -> bool:
    return any(IMAGE in piece.all_sources for piece in axis)


def place(axis: Axis) -> tuple[int | None, int | None]:
    """Numbers of tokens before and after the image in an axis; None where it varies from call to call."""
    at = next(i for i, piece in enumerate(axis) if IMAGE in piece.all_sources)
    before, after = axis[:at], axis[at + 1 :]
    return _known(before), _known(after)


def _known(pieces: Axis) -> int | None:
    return sum(p.size for p in pieces) if all(p.expr.isdigit() for p in pieces) else None


@dataclass
class Lane:
    """Emits nodes before `end`. `changed` maps an original node to its replacement; more are added as they are emitted."""

    graph: fx.Graph
    axes: Mapping[fx.Node, Value]
    grid: fx.Node
    changed: dict[fx.Node, fx.Node]
    compressed: bool
    affected: frozenset[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        affected: set[fx.Node] = set(self.changed)
        for node in self.graph.nodes:
            if affected.intersection(node.all_input_nodes):
                affected.add(node)
        self.affected = frozenset(affected)

    def emit(self, target: fx.Node) -> fx.Node:
        """The target's counterpart in this lane."""
        needed = _ancestors(target)
        for node in list(self.graph.nodes):
            if node in self.affected and node in needed and node not in self.changed:
                self.changed[node] = self._copy(node)
        return self.changed[target]

    def _copy(self, node: fx.Node) -> fx.Node:
        if self.compressed and name_of(node) in _CUTS and self._cuts_image(node):
            raise RewriteError(f"{node.target} cuts through compressed tokens at {node.name}")
        new = self.graph.node_copy(node, lambda operand: self._operand(node, operand))
        new.meta = dict(node.meta)
        if self.compressed:
            self._resize(node, new)
        return new

    def _operand(self, user: fx.Node, operand: fx.Node) -> fx.Node:
        if operand in self.changed:
            return self.changed[operand]
        axes = self.axes.get(operand)
        if not self.compressed or not isinstance(axes, tuple):
            return operand
        for dim, axis in enumerate(axes):
            if is_image(axis) and axis_size(axis) > 1:
                sampled = self.graph.call_function(sample_axis, (operand, dim, self.grid, *place(axis)))
                sampled.meta = dict(operand.meta)
                self.changed[operand] = sampled
                operand = sampled
        return operand

    def _cuts_image(self, node: fx.Node) -> bool:
        axes = self.axes.get(node.all_input_nodes[0])
        at = 2 if "split" in name_of(node) or name_of(node) == "chunk" else 1
        dim = node.args[at] if len(node.args) > at else 0
        return isinstance(axes, tuple) and is_image(axes[dim])

    def _resize(self, node: fx.Node, new: fx.Node) -> None:
        """Sizes along the token axis become "what remains"."""
        axes = self.axes[node]
        name = name_of(node)
        if name in _SIZED_AS_A_WHOLE:
            sizes = list(new.args[1])
            token_dims = [d for d, axis in enumerate(axes) if is_image(axis) and axis_size(axis) > 1]
            if len(token_dims) > 1:
                raise RewriteError(f"{node.name} has the image tokens in several dimensions")
            shape = shape_of(node) or ()
            for d, size in enumerate(sizes):
                if d in token_dims:
                    sizes[d] = -1
                elif size == -1 and name != "expand":
                    sizes[d] = self._static(node, d, shape[d])
            new.args = (new.args[0], sizes)
        elif name in ("slice", "slice_scatter"):
            self._reslice(node, new, offset=2 if name == "slice_scatter" else 1)

    def _static(self, node: fx.Node, dim: int, size: Any) -> Any:
        if isinstance(size, int):
            return size
        raise RewriteError(f"{node.name}: the size of dimension {dim} is unknown on compressed tokens")

    def _reslice(self, node: fx.Node, new: fx.Node, offset: int) -> None:
        """A cut at the image's edge moves with it: positions after the image are counted from the end."""
        arguments: list[Any] = [*node.args, *[None] * (offset + 3 - len(node.args))]
        dim = arguments[offset] or 0
        axis = self.axes[node.args[0]][dim]
        if not is_image(axis):
            return
        if len(node.args) > offset + 3 and node.args[offset + 3] != 1:
            raise RewriteError(f"{node.name} takes every {node.args[offset + 3]}th of the tokens, which on compressed ones are others")
        length = axis_size(axis)
        edges = [self._edge(node, arguments[offset + i], axis, length) for i in (1, 2)]
        new.args = (*new.args[:offset], dim, edges[0], edges[1])

    def _edge(self, node: fx.Node, position: Any, axis: Axis, length: int) -> Any:
        if position is None:
            return None
        value = hint(position.meta["val"]) if isinstance(position, fx.Node) else int(position)
        value = value + length if value < 0 else min(value, length)
        if value == length:
            return None
        index = next(i for i, piece in enumerate(axis) if IMAGE in piece.all_sources)
        start, behind = axis_size(axis[:index]), _known(axis[index + 1 :])
        if value <= start:
            return self.changed.get(position, position) if isinstance(position, fx.Node) else position
        if behind is None or value < length - behind:
            raise RewriteError(f"{node.name} cuts through the image tokens, or at a place that does not follow from the grid")
        return value - length


def _ancestors(node: fx.Node) -> frozenset[fx.Node]:
    found, pending = {node}, [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                pending.append(operand)
    return frozenset(found)
