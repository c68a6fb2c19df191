"""Clone a branch of a site's graph: the way from a changed node to a target, emitted again beside the original.

Where the change thins the image tokens, sizes along the token axis follow, and tables by token that join the branch (RoPE,
masks) are sampled by the same stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from edit_compile.designs.ops.token_spans import sample_axis
from edit_compile.passes.axes.algebra import Axis, Value, axes_of, axis_size, hint
from edit_compile.passes.graph_walk import argument, downstream, number, op_name, operand, shape_of, upstream
from edit_compile.passes.site_graph import IMAGE, Refused, image_place, is_image, known_length

_SIZED_AS_A_WHOLE = ("view", "reshape", "_unsafe_view", "expand")
_CUTS = ("split", "split_with_sizes", "chunk", "unbind", "select", "unflatten", "narrow")


@dataclass
class BranchCloner:
    """Clones nodes at the graph's insertion point.

    Attributes:
        changed: maps an original node to its replacement; more are added as they are cloned.
        stride: by which the replacement's image tokens are thinned; () for not at all.
    """

    graph: fx.Graph
    axes: Mapping[fx.Node, Value]
    grid: fx.Node
    changed: dict[fx.Node, fx.Node]
    stride: tuple[int, ...] = ()
    affected: frozenset[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.affected = frozenset(downstream(set(self.changed), self.graph))

    def clone(self, target: fx.Node) -> fx.Node:
        """Return the target's counterpart in the branch.

        Raises:
            Refused: an operation cannot run on thinned tokens; says which.
        """
        needed = set(upstream(target))
        for node in list(self.graph.nodes):
            if node in self.affected and node in needed and node not in self.changed:
                self.changed[node] = self._clone(node)
        return self.changed[target]

    def _clone(self, node: fx.Node) -> fx.Node:
        if self.stride and op_name(node) in _CUTS and self._cuts_image(node):
            raise Refused(f"{node.target} cuts through compressed tokens at {node.name}", node)
        new = self.graph.node_copy(node, self._operand)
        new.meta = dict(node.meta)
        if self.stride:
            self._resize(node, new)
        return new

    def _operand(self, source: fx.Node) -> fx.Node:
        if source in self.changed:
            return self.changed[source]
        axes, whole = self.axes.get(source), source
        if not self.stride or not isinstance(axes, tuple):
            return source
        for dim, axis in enumerate(axes):
            if is_image(axis) and axis_size(axis) > 1:
                sampled = self.graph.call_function(sample_axis, (source, dim, self.grid, *image_place(axis), self.stride))
                sampled.meta = dict(source.meta)
                self.changed[whole] = source = sampled
        return source

    def _cuts_image(self, node: fx.Node) -> bool:
        axes = self.axes.get(node.all_input_nodes[0])
        at = 2 if "split" in op_name(node) or op_name(node) == "chunk" else 1
        return isinstance(axes, tuple) and is_image(axes[number(node, at, "dim", 0)])

    def _resize(self, node: fx.Node, new: fx.Node) -> None:
        """Turn sizes along the token axis into "what remains"."""
        name = op_name(node)
        if name in _SIZED_AS_A_WHOLE:
            axes, sizes = axes_of(node, self.axes), list(argument(new, 1, "size"))
            token_dims = [d for d, axis in enumerate(axes) if is_image(axis) and axis_size(axis) > 1]
            if len(token_dims) > 1:
                raise Refused(f"{node.name} has the image tokens in several dimensions", node)
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
        raise Refused(f"{node.name}: the size of dimension {dim} is unknown on compressed tokens", node)

    def _reslice(self, node: fx.Node, new: fx.Node, offset: int) -> None:
        """A cut at the image's edge moves with it: positions after the image are counted from the end."""
        arguments: list[Any] = [*node.args, *[None] * (offset + 3 - len(node.args))]
        dim = arguments[offset] or 0
        axis = axes_of(operand(node, 0), self.axes)[dim]
        if not is_image(axis):
            return
        if len(node.args) > offset + 3 and node.args[offset + 3] != 1:
            raise Refused(f"{node.name} takes every {node.args[offset + 3]}th of the tokens, which on compressed ones are others", node)
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
        index = next(i for i, segment in enumerate(axis) if IMAGE in segment.all_sources)
        start, behind = axis_size(axis[:index]), known_length(axis[index + 1 :])
        if value <= start:
            return self.changed.get(position, position) if isinstance(position, fx.Node) else position
        if behind is None or value < length - behind:
            raise Refused(f"{node.name} cuts through the image tokens, or at a place that does not follow from the grid", node)
        return value - length
