"""What the dimensions of a site's tensors are: which one is the batch, which ones hold image tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import Axes, Axis, AxisSegment, axis_size, expression, hint
from edit_compile.passes.capture import Capture
from edit_compile.passes.graph_walk import shape_of
from edit_compile.passes.site_graph import IMAGE_SOURCE, SiteGraph, is_image

_BATCH = "batch"  # the source of the batch
_OTHERS = "others"  # the source of tokens that are not image tokens


# ------------------------------------------------------------------ of a site's inputs


def seed_axes(node: fx.Node, captured: Capture, site: SiteGraph) -> Axes | None:
    """Say what the axes of a site's input are. Its tokens are known by their number: the whole model's graph has told which there are.

    A size that is constant is no number of tokens, unless so many tokens are there always.
    """
    shape = shape_of(node)
    if shape is None or captured.sources.get(str(node.target)) is None or captured.source(node).kind != "input":
        return None
    sizes = _symbolic_sizes(node, site) or shape
    tokens = _token_axes(sizes, site)
    batch = next((d for d in range(len(shape)) if d not in tokens and len(shape) >= 3), None)
    return tuple(tokens[d] if d in tokens else _batch(s) if d == batch else _other(s) for d, s in enumerate(sizes))


def _symbolic_sizes(node: fx.Node, site: SiteGraph) -> tuple[Any, ...] | None:
    """Return the sizes of an input as the site's own graph has them: where it is captured again, they may be constants."""
    original = next((n for n in site.captured.graph.nodes if n.op == "placeholder" and n.target == node.target), None)
    return shape_of(original) if original is not None else None


def _token_axes(sizes: Sequence[Any], site: SiteGraph) -> dict[int, Axis]:
    """Return the axes of those dimensions that hold tokens: one that holds all of some segments, or as many as the image's grid has."""
    known, grid = _known_lengths(site), site.plan.grid_sizes
    last = len(sizes) - len(grid)
    hints = [hint(size) for size in sizes]
    spread = next((at for at in range(last + 1) if len(grid) > 1 and tuple(hints[at : at + len(grid)]) == grid and at > 0), None)
    if spread is not None and _may_be_tokens(sizes[spread : spread + len(grid)], known.get(math.prod(grid), ()), site):
        return {spread + i: (_of_grid(size, i),) for i, size in enumerate(sizes[spread : spread + len(grid)])}
    found = {d: known[h] for d, h in enumerate(hints) if h in known and (_constant(known[h]) or _may_be_tokens([sizes[d]], known[h], site))}
    if len(sizes) >= 3 and len(found) > 1 and 0 in found and _batch_size(site) == hints[0]:
        del found[0]
    return found


def _may_be_tokens(sizes: Sequence[Any], run: Axis, site: SiteGraph) -> bool:
    """Say whether sizes of one input may be the numbers of a run of tokens: open ones, or plain numbers where those of the run are fixed.

    They are not where the run's tokens are open in some input: a plain number that equals theirs is one of channels.
    """
    return any(map(_is_open, sizes)) or not any(set(run) <= set(open_run) for open_run in _open_runs(site))


def _open_runs(site: SiteGraph) -> Iterator[Axis]:
    """Yield the runs of tokens whose number some input of the site has open."""
    known, grid = _known_lengths(site), site.plan.grid_sizes
    inputs = [n for n in site.captured.graph.nodes if n.op == "placeholder" and site.captured.source(n).kind == "input"]
    for number in {hint(size) for n in inputs for size in shape_of(n) or () if _is_open(size)}:
        if number in known:
            yield known[number]
        if number in grid and len(grid) > 1:
            yield known.get(math.prod(grid), ())


def _is_open(size: Any) -> bool:
    """Say whether a size is a symbol's, and not one that turned out to be a constant while the site was captured."""
    return isinstance(size, torch.SymInt) and not expression(size).isdigit()


def _constant(axis: Axis) -> bool:
    return all(segment.expr.isdigit() for segment in axis)


def _batch_size(site: SiteGraph) -> int | None:
    """Return the batch's size in the example: that of the first dimension of most inputs."""
    inputs = [n for n in site.captured.graph.nodes if n.op == "placeholder" and site.captured.source(n).kind == "input"]
    first = [hint(shape[0]) for n in inputs if len(shape := shape_of(n) or ()) >= 3]
    return max(first, key=first.count, default=None)


def counts_tokens(size: Any, site: SiteGraph) -> bool:
    """Say whether a dimension of this size may be one of tokens."""
    known = _known_lengths(site)
    return _is_open(size) or (hint(size) in known and _may_be_tokens([size], known[hint(size)], site))


def equal_sizes(site: SiteGraph) -> str:
    """Say which numbers of tokens of the example are those of something else too, "" if none is."""
    plan, batch = site.plan, _batch_size(site)
    meanings: dict[int, set[str]] = {batch: {"images of the batch"}} if batch is not None else {}
    for layout, sizes in ((plan.query_layout, plan.query_sizes), (plan.key_layout, plan.key_sizes)):
        kinds = [f"{segment.kind} tokens" for segment in layout.segments]
        for what, size in (*zip(kinds, sizes, strict=True), *([("all tokens", sum(sizes))] if len(sizes) > 1 else ())):
            meanings.setdefault(size, set()).add(what)
    for node in site.captured.graph.nodes:
        for size in (shape_of(node) or ())[-1:] if node.op == "placeholder" and site.captured.source(node).kind == "input" else ():
            if not _is_open(size):
                meanings.setdefault(hint(size), set()).add("channels")
    return ", ".join(f"{size} are {' and '.join(sorted(meant))}" for size, meant in meanings.items() if len(meant) > 1)


def _known_lengths(site: SiteGraph) -> dict[int, Axis]:
    """Map numbers of tokens to the runs of segments that have so many: the whole sequence first, then single segments, then runs."""
    known: dict[int, Axis] = {}
    plan = site.plan
    for layout, sizes in ((plan.query_layout, plan.query_sizes), (plan.key_layout, plan.key_sizes)):
        segments = tuple(
            _image_segment(size, segment.length, plan.grid_sizes)
            if segment.kind is TokenKind.IMAGE
            else AxisSegment(size, segment.length, frozenset({_OTHERS}))
            for size, segment in zip(sizes, layout.segments, strict=True)
        )
        for run in _runs(segments):
            if axis_size(run) > 1:
                known.setdefault(axis_size(run), run)
    return known


def _runs(segments: Axis) -> Iterator[Axis]:
    """Yield the whole, the single segments, and then the runs in which the image is."""
    yield segments
    yield from ((segment,) for segment in segments)
    images = [i for i, segment in enumerate(segments) if IMAGE_SOURCE in segment.all_sources]
    for at in images[:1]:
        for low in range(at + 1):
            yield from (segments[low:high] for high in range(at + 1, len(segments) + 1))


def _image_segment(size: int, expr: str, grid: Sequence[int]) -> AxisSegment:
    """Make the segment of the image tokens, composed of the grid's dimensions where these are known."""
    dims = tuple((_of_grid(n, i),) for i, n in enumerate(grid)) if len(grid) > 1 and math.prod(grid) == size else ()
    return AxisSegment(size, expr, frozenset({IMAGE_SOURCE}), dims)


def _of_grid(size: Any, index: int) -> AxisSegment:
    return AxisSegment(hint(size), expression(size), frozenset({IMAGE_SOURCE, _grid_source(index)}))


def _grid_source(index: int) -> str:
    return f"{IMAGE_SOURCE} {index}"  # of one dimension of the grid


def _batch(size: Any) -> Axis:
    return (AxisSegment(hint(size), expression(size), frozenset({_BATCH})),)


def _other(size: Any) -> Axis:
    return (AxisSegment(hint(size), expression(size)),)


# ------------------------------------------------------------------ of any tensor of a site


@dataclass(frozen=True)
class TokenDims:
    """Where a tensor has its batch and its image tokens.

    Attributes:
        batch: the dimension of the batch.
        tokens: the dimension of the tokens, among which the image's are; or those of the image's grid, one each.
        rest: the others, the channels.
    """

    batch: int
    tokens: tuple[int, ...]
    rest: tuple[int, ...]


def token_dims(axes: Axes, grid: Sequence[int]) -> TokenDims | None:
    """Say where a tensor has its batch and its tokens; None where they are merged or in no order that is known.

    Args:
        grid: the image's, in the example; () if it is not known.
    """
    tokens = image_dims(axes)
    batch = next((d for d, axis in enumerate(axes) if _stems_from(axis, _BATCH)), 0)
    if not tokens or batch in tokens or any(_stems_from(axes[d], _BATCH) for d in tokens):
        return None
    if len(tokens) > 1 and not _are_grid(axes, tokens, grid):
        return None
    return TokenDims(batch, tokens, tuple(d for d in range(len(axes)) if d != batch and d not in tokens))


def image_dims(axes: Axes) -> tuple[int, ...]:
    """List the dimensions that hold image tokens."""
    return tuple(d for d, axis in enumerate(axes) if is_image(axis) and axis_size(axis) > 1)


def grid_dimension(axis: Axis, grid: Sequence[int]) -> int | None:
    """Tell which dimension of the image's grid an axis is; None if it is not one of them."""
    return next((i for i, size in enumerate(grid) if axis_size(axis) == size and len(grid) > 1 and _only_of_grid(axis, i)), None)


def _are_grid(axes: Axes, dims: Sequence[int], grid: Sequence[int]) -> bool:
    return len(dims) == len(grid) and all(grid_dimension(axes[d], grid) == i for i, d in enumerate(dims))


def _only_of_grid(axis: Axis, index: int) -> bool:
    grid_sources = {source for segment in axis for source in segment.all_sources if source.startswith(f"{IMAGE_SOURCE} ")}
    return len(axis) == 1 and grid_sources == {_grid_source(index)}


def _stems_from(axis: Axis, source: str) -> bool:
    return any(source in segment.all_sources for segment in axis)


# ------------------------------------------------------------------ numbers of tokens


@dataclass(frozen=True)
class SegmentEnds:
    """How many tokens runs of segments have, in the sizes of the site's own inputs.

    Attributes:
        sizes: of runs that an input has along a dimension, or that inputs which are numbers count.
    """

    sizes: Mapping[Axis, Any]

    @classmethod
    def of(cls, graph: fx.Graph, axes: Mapping[fx.Node, Any], grid: Sequence[int] = ()) -> SegmentEnds:
        """Read them off the graph's inputs.

        Args:
            grid: the image's, in the example; () if it is not known.
        """
        sizes: dict[Axis, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder" and isinstance(axes.get(node), tuple):
                for axis, size in zip(axes[node], shape_of(node) or (), strict=True):
                    if any(segment.all_sources & {IMAGE_SOURCE, _OTHERS} for segment in axis):
                        sizes.setdefault(axis, size)
        _add_numbers(sizes, graph, grid, tuple(segment for run in sizes for segment in run))
        return cls(sizes)

    def size(self, run: Axis) -> Any:
        """Return a run's number of tokens, a number or a `SymInt`; None if the inputs do not tell."""
        if run in self.sizes:
            return self.sizes[run]
        each = [int(s.expr) if s.expr.isdigit() else self.sizes.get((s,)) for s in run]
        return None if any(size is None for size in each) else sum(each)

    def ends(self, run: Axis, whole: Axis) -> list[Any]:
        """List what is known of a run's number of tokens, from whose front it is: counted, or what the rest of the whole leaves over."""
        total, rest = self.size(whole), self.size(whole[len(run) :])
        left_over = None if total is None or rest is None else total - rest
        return [found for found in (self.size(run), left_over) if found is not None]


def _add_numbers(sizes: dict[Axis, Any], graph: fx.Graph, grid: Sequence[int], segments: Axis) -> None:
    """Add what inputs that are numbers count: the tokens of a segment, or the dimensions of the image's grid."""
    given = [value for node in graph.nodes if node.op == "placeholder" and isinstance(value := node.meta.get("val"), torch.SymInt)]
    by_hint = {hint(value): value for value in given}
    dims = [by_hint[size] for size in grid if size in by_hint]
    for segment in segments:
        counted = by_hint.get(segment.size)
        if counted is None and IMAGE_SOURCE in segment.all_sources and len(dims) == len(grid) > 1 and math.prod(grid) == segment.size:
            counted = reduce(operator.mul, dims)
        if counted is not None:
            sizes.setdefault((segment,), counted)
