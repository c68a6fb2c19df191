"""Token kinds and the image grid, by structure: what carries the model's output is IMAGE, other inputs are TEXT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edit_compile.ir.tokens import Grid, Segment, TokenKind, TokenLayout
from edit_compile.passes.axes.algebra import Axis, AxisSegment, Value, hint, new_axis
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.capture import Capture
from edit_compile.passes.graph_walk import shape_of

MAX_ID_COLUMNS = 4


@dataclass(frozen=True)
class TokenMap:
    """A captured graph's axes, and which of its inputs are image_inputs."""

    axes: Mapping[fx.Node, Value]
    image_inputs: frozenset[str]

    def kind(self, piece: AxisSegment) -> TokenKind:
        sources = piece.all_sources
        if sources & self.image_inputs:
            return TokenKind.IMAGE
        return TokenKind.TEXT if sources else TokenKind.OTHER

    def layout(self, axis: Axis) -> tuple[TokenLayout, tuple[int, ...]]:
        """The axis' segments, neighbours of one kind joined, and their sizes in the example."""
        segments: list[Segment] = []
        sizes: list[int] = []
        for piece in axis:
            kind = self.kind(piece)
            if segments and segments[-1].kind is kind:
                segments[-1] = Segment(kind, _sum(segments[-1].length, piece.expr))
                sizes[-1] += piece.size
            else:
                segments.append(Segment(kind, piece.expr))
                sizes.append(piece.size)
        return TokenLayout(tuple(segments)), tuple(sizes)

    def grid(self, axis: Axis) -> Grid | None:
        """The dimensions of the input image that were flattened into the axis' image tokens."""
        pieces = [p for p in axis if self.kind(p) is TokenKind.IMAGE]
        if len(pieces) != 1 or len(pieces[0].composed_of) < 2:
            return None
        if any(len(factor) != 1 or self.kind(factor[0]) is not TokenKind.IMAGE for factor in pieces[0].composed_of):
            return None
        return Grid(tuple(factor[0].expr for factor in pieces[0].composed_of))

    def grid_sizes(self, axis: Axis) -> tuple[int, ...]:
        """The grid's sizes in the example; where it is unknown, the number of image tokens alone."""
        pieces = [p for p in axis if self.kind(p) is TokenKind.IMAGE]
        if self.grid(axis) is None:
            return (sum(p.size for p in pieces),)
        return tuple(factor[0].size for factor in pieces[0].composed_of)


def _sum(a: str, b: str) -> str:
    return str(int(a) + int(b)) if a.isdigit() and b.isdigit() else f"{a} + {b}"


def classify_tokens(captured: Capture) -> TokenMap:
    """Follow every axis of the graph from its inputs, and tell image_inputs from other inputs."""

    def seed(node: fx.Node) -> Any:
        shape = shape_of(node)
        if captured.source(node).kind != "input" or shape is None:
            return None
        return tuple(new_axis(size, node.name) if hint(size) > 1 or d else new_axis(size) for d, size in enumerate(shape))

    axes = flow_axes(captured.graph, seed)
    return TokenMap(axes, _image_inputs(captured, axes))


def _image_inputs(captured: Capture, axes: Mapping[fx.Node, Value]) -> frozenset[str]:
    """The inputs whose positions the output's positions are: a denoiser's output has the shape of its noisy input."""
    inputs = {n.name: n for n in captured.graph.nodes if n.op == "placeholder" and captured.source(n).kind == "input" and shape_of(n)}
    carried: set[str] = set()
    for output in captured.graph.output_node().all_input_nodes:
        if isinstance(axes.get(output), tuple):
            carried |= {s for axis in axes[output][1:] for piece in axis for s in piece.all_sources}
    if carried:
        return frozenset(carried)
    ranks = {name: len(shape_of(n) or ()) for name, n in inputs.items() if n.meta["val"].is_floating_point()}
    most = max(ranks.values(), default=0)
    return frozenset(name for name, rank in ranks.items() if rank == most and rank >= 3)


def position_ids(captured: Capture, tokens: TokenMap, length: int) -> str | None:
    """The input that holds the image tokens' positions: (N, D) or (B, N, D) with few columns, feeding no Linear."""
    for node in captured.graph.nodes:
        if node.op != "placeholder" or node.name not in tokens.image_inputs:
            continue
        shape = shape_of(node)
        by_token = shape is not None and len(shape) in (2, 3) and hint(shape[-2]) == length and 2 <= hint(shape[-1]) <= MAX_ID_COLUMNS
        if by_token and not any(user.target is torch.ops.aten.linear.default for user in node.users):
            return captured.source(node).name
    return None
