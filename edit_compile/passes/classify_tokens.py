"""Token kinds and the image grid, by structure: what carries the model's output is IMAGE, other inputs are TEXT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce

from torch import fx

from edit_compile.ir.size_expressions import same_value, symbols_in
from edit_compile.ir.tokens import Grid, Segment, TokenKind, TokenLayout
from edit_compile.passes.axes.algebra import (
    Axes,
    Axis,
    AxisSegment,
    FirstDim,
    Value,
    WithoutRule,
    axis_size,
    hint,
    new_axis,
    operator_without_rule,
    sources_of,
)
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.capture import Capture
from edit_compile.passes.graph_walk import shape_of


@dataclass(frozen=True)
class TokenMap:
    """A captured graph's axes, and which of its inputs carry the image.

    Attributes:
        lost_in: the operator, if any, because of which it is not known which inputs those are.
    """

    axes: Mapping[fx.Node, Value]
    image_inputs: frozenset[str]
    lost_in: str | None = None

    @cached_property
    def _image_sources(self) -> frozenset[str]:
        return self.image_inputs | set(map(_first_dim, self.image_inputs))

    def kind(self, segment: AxisSegment) -> TokenKind:
        """Return what the positions of a segment stand for."""
        sources = segment.all_sources
        if not sources.isdisjoint(self._image_sources):
            return TokenKind.IMAGE
        return TokenKind.TEXT if any(not isinstance(source, WithoutRule) for source in sources) else TokenKind.OTHER

    def from_video(self, axis: Axis) -> bool:
        """Say whether image tokens stem from an input (B, C, t, h, w) of several frames, rows and columns."""
        return any(len(found) == 5 and all(axis_size(dim) > 1 for dim in found[2:]) for found in self._inputs_of(axis))

    def from_pictures(self, axis: Axis) -> bool:
        """Say whether image tokens stem from an input with rows and columns: (B, C, h, w) or more."""
        return any(len(found) >= 4 for found in self._inputs_of(axis))

    def _inputs_of(self, axis: Axis) -> Iterator[Axes]:
        sources = sources_of([tuple(segment for segment in axis if self.kind(segment) is TokenKind.IMAGE)])
        for node, found in self.axes.items():
            if node.op == "placeholder" and node.name in sources and isinstance(found, tuple):
                yield found

    def last_sizes(self, rank: int) -> set[str]:
        """Return the sizes of the last dimension of the inputs with the image that have so many dimensions."""
        inputs = (found for node, found in self.axes.items() if node.op == "placeholder" and node.name in self.image_inputs)
        return {segment.expr for found in inputs if isinstance(found, tuple) and len(found) == rank for segment in found[-1]}

    def operator_without_rule(self, *axes: Axis) -> str | None:
        """Return the name of an operator because of which it is not known what image positions became; None if there is none."""
        of_images = (segment for axis in axes for segment in axis if self.kind(segment) is TokenKind.IMAGE)
        return next((name for segment in of_images if (name := operator_without_rule([(segment,)])) is not None), self.lost_in)

    def layout(self, axis: Axis) -> tuple[TokenLayout, tuple[int, ...]]:
        """Return an axis' segments, neighbours of one kind joined, and their sizes in the example."""
        segments: list[Segment] = []
        sizes: list[int] = []
        for segment in axis:
            kind = self.kind(segment)
            length = self._length(segment)
            if segments and segments[-1].kind is kind:
                segments[-1] = Segment(kind, _sum(segments[-1].length, length))
                sizes[-1] += segment.size
            else:
                segments.append(Segment(kind, length))
                sizes.append(segment.size)
        return TokenLayout(tuple(segments)), tuple(sizes)

    def _length(self, segment: AxisSegment) -> str:
        """Return the number of positions; of the longest of several samples, that of one, for there is one grid."""
        dims = self._image_dims((segment,)) if "Max" in segment.expr else []
        return "*".join(f"({dim.expr})" for dim in dims) or segment.expr

    def grid(self, axis: Axis) -> Grid | None:
        """Return the dimensions of the input image that were flattened into the axis' image tokens; None if unknown."""
        dims = self._image_dims(axis)
        return Grid(tuple(dim.expr for dim in dims)) if dims else None

    def grid_sizes(self, axis: Axis) -> tuple[int, ...]:
        """Return the grid's sizes in the example; where it is unknown, the number of image tokens alone."""
        dims = self._image_dims(axis)
        return tuple(dim.size for dim in dims) if dims else (sum(segment.size for segment in self._image_segments(axis)),)

    def _image_dims(self, axis: Axis) -> list[AxisSegment]:
        """Find the two or more dimensions whose product is the axis' only image segment, if they are of the image alone.

        What was added to a part of a dimension, as a pose to all frames but the first, leaves it one dimension.
        """
        found = self._image_segments(axis)
        dims = found[0].composed_of if len(found) == 1 else ()
        if len(dims) < 2 or any(self.kind(segment) is not TokenKind.IMAGE for dim in dims for segment in dim):
            return []
        return _multiplied(found[0], [dim[0] if len(dim) == 1 else _one_segment(dim) for dim in dims])

    def _image_segments(self, axis: Axis) -> list[AxisSegment]:
        return [segment for segment in axis if self.kind(segment) is TokenKind.IMAGE]


def _one_segment(axis: Axis) -> AxisSegment:
    length = reduce(_sum, (segment.expr for segment in axis))
    return AxisSegment(axis_size(axis), length, sources_of([axis]), in_order=all(segment.in_order for segment in axis))


def _multiplied(product: AxisSegment, dims: list[AxisSegment]) -> list[AxisSegment]:
    """Correct dimensions of which one is the example's number, or unknown, though the product has it open: the others leave it over."""
    constant = [i for i, dim in enumerate(dims) if not symbols_in(dim.expr)]
    if len(constant) != 1 or product.expr.isdigit():
        return dims
    at = constant[0]
    if dims[at].expr.isdigit() and same_value(product.expr, "*".join(f"({dim.expr})" for dim in dims)):
        return dims
    rest = "*".join(f"({dim.expr})" for i, dim in enumerate(dims) if i != at)
    return [*dims[:at], replace(dims[at], expr=f"({product.expr})//({rest})"), *dims[at + 1 :]]


def _sum(a: str, b: str) -> str:
    return str(int(a) + int(b)) if a.isdigit() and b.isdigit() else f"{a} + {b}"


def classify_tokens(captured: Capture) -> TokenMap:
    """Follow every axis of the graph from its inputs, and find the inputs that carry the image."""

    def seed(node: fx.Node) -> Axes | None:
        shape = shape_of(node)
        if captured.source(node).kind != "input" or shape is None:
            return None
        first = node.name if len(shape) == 2 else _first_dim(node.name)  # (tokens, channels) without a batch too
        return tuple(new_axis(size, node.name if d else first) if hint(size) > 1 or d else new_axis(size) for d, size in enumerate(shape))

    axes = flow_axes(captured.graph, seed)
    return TokenMap(axes, *_image_inputs(captured, axes))


def _first_dim(name: str) -> FirstDim:
    return FirstDim(f"{name}.shape[0]")


def _image_inputs(captured: Capture, axes: Mapping[fx.Node, Value]) -> tuple[frozenset[str], str | None]:
    """Find the inputs whose positions the output's positions are: a denoiser's output has the shape of its noisy input.

    Where the output has no positions, as a classifier's: the images and videos. An embedding, one vector a sample, is no image.

    Returns:
        The names, and the operator, if any, because of which there may be fewer.
    """
    placeholders = (node for node in captured.graph.nodes if node.op == "placeholder" and captured.source(node).kind == "input")
    inputs = {node.name: node for node in placeholders if shape_of(node)}
    most = max((_rank(node) for node in inputs.values() if node.meta["val"].is_floating_point()), default=0)
    pictures = frozenset(name for name, node in inputs.items() if _rank(node) == most >= 4 and node.meta["val"].is_floating_point())
    outputs = [found for node in captured.graph.output_node().all_input_nodes if isinstance(found := axes.get(node), tuple)]
    positions = [axis for output in outputs if len(output) >= 3 for axis in output[1:]]  # (batch, channels) has none
    carried = frozenset(source for source in sources_of(positions) if not isinstance(source, WithoutRule | FirstDim))
    if (lost_in := operator_without_rule(positions)) is not None:
        return (carried & pictures or carried), None if len(carried & pictures) == 1 or len(carried) < 2 else lost_in
    if not carried:
        return pictures, None
    return (carried if any(_rank(inputs[name]) >= 3 for name in carried if name in inputs) else frozenset()), None


def _rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())
