"""Clone a branch of a site's graph: the way from a changed node to a target, emitted again beside the original.

Where the change thins the image tokens, sizes and cuts along the token axis follow, and tables by token that join the branch
(RoPE, masks) are sampled by the same stride.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edit_compile.designs.base import thinned_grid
from edit_compile.designs.ops.token_spans import dropped_tokens, every_nth, sample_axis
from edit_compile.passes.axes.algebra import Axis, Value, axes_of, axis_size, expression, hint
from edit_compile.passes.graph_walk import argument, number, op_name, operand, shape_of, upstream
from edit_compile.passes.op_traits import is_pointwise
from edit_compile.passes.site_axes import SegmentEnds, grid_dimension, image_dims
from edit_compile.passes.site_graph import IMAGE_SOURCE, Refused, image_place, is_image
from edit_compile.passes.token_cuts import add, size_of

aten = torch.ops.aten
_SIZED_AS_A_WHOLE = ("view", "reshape", "_unsafe_view", "expand")
_SLICES = {"slice": 1, "slice_scatter": 2}  # and which argument the dimension is
_CUTS = ("split", "split_with_sizes", "chunk", "unbind", "unflatten", "narrow", "tensor_split")


@dataclass
class BranchCloner:
    """Clones nodes at the graph's insertion point.

    Attributes:
        changed: maps an original node to its replacement; more are added as they are cloned.
        stride: by which the replacement's image tokens are thinned; () for not at all.
        grid_sizes: of the image tokens in the example; () if they are not known.
    """

    graph: fx.Graph
    axes: Mapping[fx.Node, Value]
    grid: fx.Node
    changed: dict[fx.Node, fx.Node]
    stride: tuple[int, ...] = ()
    grid_sizes: tuple[int, ...] = ()
    affected: frozenset[fx.Node] = field(init=False)
    ends: SegmentEnds = field(init=False)

    def __post_init__(self) -> None:
        affected = set(self.changed)
        for node in self.graph.nodes:  # not sizes: they are moved where they are used, knowing for which side of the image
            if affected.intersection(node.all_input_nodes) and not isinstance(node.meta.get("val"), int | torch.SymInt):
                affected.add(node)
        self.affected = frozenset(affected)
        self.ends = SegmentEnds.of(self.graph, self.axes, self.grid_sizes)

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
        new = self.graph.node_copy(node, lambda source: self._operand(source, node))
        new.meta = dict(node.meta)
        if node.target is aten.view.default:
            new.target = aten.reshape.default  # what a tap makes may lie in memory otherwise
        elif node.target is aten.view_as_complex.default:
            with self.graph.inserting_before(new):
                new.args = (self.graph.call_method("contiguous", new.args),)
        if self.stride:
            self._resize(node, new)
        return new

    # -------------------------------------------------------------- what joins the branch

    def _operand(self, source: fx.Node, user: fx.Node) -> fx.Node:
        """Return what the branch has in the place of an operand: its counterpart, or a table by token sampled."""
        if source in self.changed:
            return self.changed[source]
        if not self.stride or not isinstance(self.axes.get(source), tuple):
            return source
        axes, sampled = self._axes_in(source, user), source
        for dim in image_dims(axes):
            sampled = self._sample(source, sampled, dim, axes[dim])
        if sampled is not source and axes == self.axes[source]:
            self.changed[source] = sampled
        return sampled

    def _axes_in(self, source: fx.Node, user: fx.Node) -> tuple[Axis, ...]:
        """Return an operand's axes; of a pointwise operation's, those that the result has at its dimensions say what these are."""
        axes, result = axes_of(source, self.axes), self.axes.get(user)
        if not is_pointwise(user) or not isinstance(result, tuple) or len(axes) > len(result):
            return axes
        aligned = result[len(result) - len(axes) :]
        return tuple(
            there if not is_image(own) and is_image(there) and axis_size(own) == axis_size(there) else own
            for own, there in zip(axes, aligned, strict=True)
        )

    def _sample(self, source: fx.Node, sampled: fx.Node, dim: int, axis: Axis) -> fx.Node:
        index = grid_dimension(axis, self.grid_sizes)
        if index is not None:
            new = self.graph.call_function(every_nth, (sampled, dim, self.grid, index, self.stride))
        else:
            new = self.graph.call_function(sample_axis, (sampled, dim, self.grid, *image_place(axis), self.stride))
        new.meta = dict(source.meta)
        return new

    # -------------------------------------------------------------- sizes and cuts

    def _cuts_image(self, node: fx.Node) -> bool:
        axes = self.axes.get(node.all_input_nodes[0])
        at = 2 if "split" in op_name(node) or op_name(node) == "chunk" else 1
        return isinstance(axes, tuple) and is_image(axes[number(node, at, "dim", 0)])

    def _resize(self, node: fx.Node, new: fx.Node) -> None:
        """Make sizes and positions along the token axis those of the thinned tokens."""
        name = op_name(node)
        if name in _SIZED_AS_A_WHOLE:
            new.args = (new.args[0], self._sizes(node, list(argument(new, 1, "size")), new))
        elif name in _SLICES:
            self._reslice(node, new, offset=_SLICES[name])
        elif name == "select":
            self._reselect(node, new)

    def _sizes(self, node: fx.Node, sizes: list[Any], new: fx.Node) -> list[Any]:
        axes = axes_of(node, self.axes)
        dims = image_dims(axes)
        for d in dims:
            if sizes[d] == -1:
                continue
            index = grid_dimension(axes[d], self.grid_sizes)
            if len(dims) > 1 and index is None:
                raise Refused(f"{node.name} has the image tokens in several dimensions, which are not those of their grid", node)
            with self.graph.inserting_before(new):
                if index is not None:
                    grid = self.graph.call_function(thinned_sizes, (self.grid, self.stride))
                    sizes[d] = self.graph.call_function(operator.getitem, (grid, index))
                else:
                    sizes[d] = -1 if -1 not in sizes else self._moved(sizes[d])
        return sizes

    def _reslice(self, node: fx.Node, new: fx.Node, offset: int) -> None:
        arguments: list[Any] = [*node.args, *[None] * (offset + 3 - len(node.args))]
        dim = arguments[offset] or 0
        axis = axes_of(operand(node, 0), self.axes)[dim]
        if not is_image(axis):
            return
        if len(node.args) > offset + 3 and node.args[offset + 3] != 1:
            raise Refused(f"{node.name} takes every {node.args[offset + 3]}th of the tokens, which on compressed ones are others", node)
        with self.graph.inserting_before(new):
            start, stop = (self._position(node, arguments[offset + i], axis, dim) for i in (1, 2))
        new.args = (*new.args[:offset], dim, start, stop)

    def _reselect(self, node: fx.Node, new: fx.Node) -> None:
        dim, index = number(node, 1, "dim"), argument(node, 2, "index")
        axis = axes_of(operand(node, 0), self.axes)[dim]
        if not is_image(axis):
            return
        start, stop = _image_span(axis)
        value = _hint(index) % axis_size(axis)
        if start <= value < stop:
            raise Refused(f"{node.name} takes one of the image tokens, which is not among the compressed ones", node)
        if value >= stop and _hint(index) >= 0:
            with self.graph.inserting_before(new):
                new.args = (new.args[0], dim, self._moved(index))

    def _position(self, node: fx.Node, position: Any, axis: Axis, dim: int) -> Any:
        """Move a cut with the image's edges: positions before the image stay, those behind it come as much earlier as it is shorter."""
        if position is None:
            return None
        value, length = _hint(position), axis_size(axis)
        if value >= length:
            return None
        place = value + length if value < 0 else value
        start, stop = _image_span(axis)
        if start < place < stop or not self._is_edge(position, place, axis, dim, node):
            raise Refused(f"{node.name} cuts through the image tokens, or at a place that does not follow from the grid", node)
        if place <= start:
            return add(size_of(operand(node, 0), dim), position) if value < 0 else position
        return position if value < 0 else self._moved(position)

    def _is_edge(self, position: Any, place: int, axis: Axis, dim: int, node: fx.Node) -> bool:
        """Say whether a position that is at an edge of the image in the example is there always, as far as the sizes tell."""
        start, stop = _image_span(axis)
        if place not in (start, stop):
            return True
        count = next(i for i in range(len(axis) + 1) if axis_size(axis[:i]) == place)
        edges = self.ends.ends(axis[:count], axis)
        given = position.meta["val"] if isinstance(position, fx.Node) else position
        if not edges:
            return isinstance(given, torch.SymInt)
        whole = self.ends.size(axis)
        if _hint(position) < 0:
            given = given + (whole if whole is not None else (shape_of(operand(node, 0)) or ())[dim])
        return any(expression(given - edge) == "0" for edge in edges)

    def _moved(self, position: Any) -> fx.Node:
        """Return a position behind the image where there are fewer image tokens."""
        fewer = self.graph.call_function(dropped_tokens, (self.grid, self.stride))
        return self.graph.call_function(operator.sub, (position, fewer))


def thinned_sizes(grid: torch.Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the thinned grid; see `thinned_grid`."""
    return thinned_grid(grid.shape, stride)


def _image_span(axis: Axis) -> tuple[int, int]:
    """Return the first and last-plus-one position of the image tokens along an axis, in the example."""
    images = [i for i, segment in enumerate(axis) if IMAGE_SOURCE in segment.all_sources]
    return axis_size(axis[: images[0]]), axis_size(axis[: images[-1] + 1])


def _hint(position: Any) -> int:
    return hint(position.meta["val"]) if isinstance(position, fx.Node) else hint(position)
