"""The algebra of axes: what every dimension of a tensor is made of.

An axis is a sum of segments (tensors joined by `cat`), a segment a product of axes (dimensions merged by a reshape).
From this alone follow the token groups (which inputs a token axis comes from) and the image grid (the two
dimensions that were flattened into it). Nothing here knows a model, a module or an argument's name.

A `size` is an `int` or a `torch.SymInt`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import fx

from edit_compile.torch_internals import size_expression, size_hint


@dataclass(frozen=True)
class AxisSegment:
    """A run of positions along an axis.

    Attributes:
        size: how many, in the example.
        expr: how many, as an expression in the sizes of the inputs.
        sources: names of the graph inputs it stems from, beside those of `composed_of`.
        composed_of: the axes it multiplies, outermost first; () if it was not merged from others.
    """

    size: int
    expr: str
    sources: frozenset[str] = frozenset()
    composed_of: tuple[Axis, ...] = ()

    @property
    def all_sources(self) -> frozenset[str]:
        """Return the sources of the segment and of all that it is composed of."""
        return reduce(operator.or_, (segment.all_sources for axis in self.composed_of for segment in axis), self.sources)


Axis = tuple[AxisSegment, ...]
Axes = tuple[Axis, ...]  # of a tensor, one for each dimension
Value = Axes | list[Axes] | None  # of a node: a tensor, several of them, or something that is not a tensor


def axes_of(node: fx.Node, axes: Mapping[fx.Node, Value]) -> Axes:
    """Return the axes of a node that is one tensor.

    Raises:
        TypeError: it is not.
    """
    found = axes.get(node)
    if not isinstance(found, tuple):
        raise TypeError(f"{node.name} is not a tensor with known axes")
    return found


def hint(size: Any) -> int:
    """Return the example's value of a size."""
    return size_hint(size) if isinstance(size, torch.SymInt) else int(size)


def expression(size: Any) -> str:
    """Return a size as an expression in the sizes of the inputs."""
    return size_expression(size) if isinstance(size, torch.SymInt) else str(int(size))


def axis_size(axis: Axis) -> int:
    """Return an axis' length in the example."""
    return sum(segment.size for segment in axis)


def new_axis(size: Any, *sources: str) -> Axis:
    """Make an axis of one segment that stems from the inputs named."""
    return (AxisSegment(hint(size), expression(size), frozenset(sources)),)


def sources_of(axes: Iterable[Axis]) -> frozenset[str]:
    """Return the inputs that any position of the axes stems from."""
    return frozenset().union(*(segment.all_sources for axis in axes for segment in axis))


def entangled(size: Any, *axes: Axis) -> Axis:
    """Make an axis whose positions stem from those of others in whatever order."""
    return (AxisSegment(hint(size), expression(size), sources_of(axes)),)


def unify(a: Axis, b: Axis) -> Axis:
    """Merge two operands' axes for their common dimension: the finer division, the union of the sources."""
    if [segment.size for segment in a] == [segment.size for segment in b]:
        return tuple(
            replace(x if x.composed_of or not y.composed_of else y, sources=x.sources | y.sources) for x, y in zip(a, b, strict=True)
        )
    if len(b) == 1 and not b[0].all_sources:
        return a
    if len(a) == 1 and not a[0].all_sources:
        return b
    return a if len(a) >= len(b) else b


def reshape_axes(axes: Axes, shape: Sequence[Any]) -> Axes:
    """Return the axes after a reshape: dimensions are matched in groups of equal product, merged and split inside a group."""
    result: list[Axis] = []
    ins, outs = list(axes), list(shape)
    if 0 in map(hint, outs):
        return tuple(new_axis(size) for size in outs)
    while ins or outs:
        group_in, group_out = ([ins.pop(0)] if ins else []), ([outs.pop(0)] if outs else [])
        product_in, product_out = math.prod(map(axis_size, group_in)), math.prod(map(hint, group_out))
        while product_in != product_out:
            if product_in < product_out:
                group_in.append(ins.pop(0))
                product_in *= axis_size(group_in[-1])
            else:
                group_out.append(outs.pop(0))
                product_out *= hint(group_out[-1])
        result += _split(_components(group_in), group_out)
    return tuple(result)


def _components(group: Iterable[Axis]) -> list[Axis]:
    """Take merged axes apart, down to those that were not merged; what a segment stems from as a whole, its components do."""
    flat: list[Axis] = []
    for axis in group:
        if len(axis) == 1 and axis[0].composed_of:
            whole = axis[0]
            flat += _components(tuple(replace(s, sources=s.sources | whole.sources) for s in inner) for inner in whole.composed_of)
        else:
            flat.append(axis)
    return [axis for axis in flat if axis_size(axis) != 1]


def _split(components: list[Axis], sizes: Sequence[Any]) -> list[Axis]:
    """Distribute components, in order, over dimensions of these sizes; uses the list up."""
    result: list[Axis] = []
    for dim, size in enumerate(sizes):
        missing = hint(size)
        taken: list[Axis] = []
        while missing > 1 and components:
            axis, length = components[0], axis_size(components[0])
            if missing % length == 0:
                taken.append(components.pop(0))
                missing //= length
            elif length % missing == 0:  # one dimension cut in two, as into patches
                sources = sources_of([axis])
                taken.append((AxisSegment(missing, str(missing), sources),))
                expr = f"({axis[0].expr})//{missing}" if len(axis) == 1 else "?"
                components[0] = (AxisSegment(length // missing, expr, sources),)
                missing = 1
            else:  # cut across the dimensions: from here on every one stems from all of them
                return result + [entangled(s, *taken, *components) if hint(s) > 1 else new_axis(s) for s in sizes[dim:]]
        result.append(_product(taken, size))
    return result


def _product(axes: Sequence[Axis], size: Any) -> Axis:
    """Multiply axes to one of this size."""
    if len(axes) == 1:
        return (replace(axes[0][0], expr=expression(size)),) if len(axes[0]) == 1 else axes[0]
    return (AxisSegment(hint(size), expression(size), composed_of=tuple(axes)),)


def slice_axis(axis: Axis, start: int, stop: int, size: Any) -> Axis:
    """Return positions start..stop of an axis. A segment that is cut through keeps its sources and is no longer composed of others.

    Args:
        size: of the result.
    """
    segments: list[AxisSegment] = []
    at = 0
    for segment in axis:
        low, high = max(start, at), min(stop, at + segment.size)
        if high - low == segment.size:
            segments.append(segment)
        elif high > low:
            segments.append(AxisSegment(high - low, _length_of_part(segment, high - low, size), segment.all_sources))
        at += segment.size
    return tuple(segments) or new_axis(size)


def _length_of_part(segment: AxisSegment, length: int, size: Any) -> str:
    """Return the length of a part of a segment as an expression; its length in the example is not a constant."""
    if length == hint(size):
        return expression(size)
    return str(length) if segment.expr.isdigit() else f"part of {segment.expr}"
