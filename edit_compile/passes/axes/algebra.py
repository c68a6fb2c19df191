"""Axes: what every dimension of a tensor is made of.

An axis is a sum of segments (tensors joined by `cat`), a segment a product of axes (dimensions merged by a reshape).
From this alone follow the token groups (which inputs a token axis comes from) and the image grid (the two
dimensions that were flattened into it). Nothing here knows a model, a module or an argument's name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch


@dataclass(frozen=True)
class AxisSegment:
    """A run of positions: its size (a hint and an expression), the graph inputs it stems from, the axes it multiplies."""

    size: int
    expr: str
    sources: frozenset[str] = frozenset()
    composed_of: tuple[Axis, ...] = ()

    @property
    def all_sources(self) -> frozenset[str]:
        return reduce(operator.or_, (p.all_sources for axis in self.composed_of for p in axis), self.sources)


Axis = tuple[AxisSegment, ...]

Axes = tuple[Axis, ...]

Value = Any  # Axes of a tensor, a list of them, or None for whatever is no tensor


def hint(size: Any) -> int:
    """Return the example's value of a size."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def expression(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(int(size))


def axis_size(axis: Axis) -> int:
    return sum(segment.size for segment in axis)


def new_axis(size: Any, *sources: str) -> Axis:
    return (AxisSegment(hint(size), expression(size), frozenset(sources)),)


def sources_of(axes: Iterable[Axis]) -> frozenset[str]:
    return frozenset().union(*(segment.all_sources for axis in axes for segment in axis))


def entangled(size: Any, *axes: Axis) -> Axis:
    """Positions that stem from those of the axes in whatever order."""
    return (AxisSegment(hint(size), expression(size), sources_of(axes)),)


def unify(a: Axis, b: Axis) -> Axis:
    """One axis for two operands' common dimension: the finer division, the union of the sources."""
    if [p.size for p in a] == [p.size for p in b]:
        return tuple(
            replace(x if x.composed_of or not y.composed_of else y, sources=x.sources | y.sources) for x, y in zip(a, b, strict=True)
        )
    if len(b) == 1 and not b[0].all_sources:
        return a
    if len(a) == 1 and not a[0].all_sources:
        return b
    return a if len(a) >= len(b) else b


def reshape_axes(axes: Axes, shape: Sequence[Any]) -> Axes:
    """The axes after a reshape: dimensions are matched in groups of equal product, merged and split inside a group."""
    result: list[Axis] = []
    ins, outs = list(axes), list(shape)
    if 0 in map(hint, outs):
        return tuple(new_axis(s) for s in outs)
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
        result += _split(_factors(group_in), group_out)
    return tuple(result)


def _factors(group: Sequence[Axis]) -> list[Axis]:
    flat: list[Axis] = []
    for axis in group:
        flat += _factors(_inherited(axis[0])) if len(axis) == 1 and axis[0].composed_of else [axis]
    return [axis for axis in flat if axis_size(axis) != 1]


def _inherited(segment: AxisSegment) -> list[Axis]:
    """The axes a segment multiplies, each stemming from whatever the segment as a whole stems from."""
    return [tuple(replace(p, sources=p.sources | segment.sources) for p in axis) for axis in segment.composed_of]


def _split(factors: list[Axis], sizes: Sequence[Any]) -> list[Axis]:
    result: list[Axis] = []
    for at, size in enumerate(sizes):
        wanted, taken = hint(size), []
        while wanted > 1 and factors:
            axis, length = factors[0], axis_size(factors[0])
            if wanted % length == 0:
                taken.append(factors.pop(0))
                wanted //= length
            elif length % wanted == 0:  # one dimension cut in two, as by a patch
                sources = sources_of([axis])
                taken.append((AxisSegment(wanted, str(wanted), sources),))
                factors[0] = (AxisSegment(length // wanted, f"({axis[0].expr})//{wanted}" if len(axis) == 1 else "?", sources),)
                wanted = 1
            else:  # cut across the dimensions: from here on every one stems from all of them
                return result + [entangled(s, *taken, *factors) if hint(s) > 1 else new_axis(s) for s in sizes[at:]]
        if not taken:
            result.append(new_axis(size))
        elif len(taken) == 1:
            only = taken[0]
            result.append((replace(only[0], expr=expression(size)),) if len(only) == 1 else only)
        else:
            result.append((AxisSegment(hint(size), expression(size), composed_of=tuple(taken)),))
    return result


def slice_axis(axis: Axis, start: int, stop: int, size: Any) -> Axis:
    """Positions start..stop of an axis. A segment that is cut through keeps its sources and loses its factors."""
    parts, at = [], 0
    for segment in axis:
        low, high = max(start, at), min(stop, at + segment.size)
        if high - low == segment.size:
            parts.append(segment)
        elif high > low:
            parts.append(AxisSegment(high - low, _length_of_part(segment, high - low, size), segment.all_sources))
        at += segment.size
    return tuple(parts) or new_axis(size)


def _length_of_part(segment: AxisSegment, length: int, size: Any) -> str:
    if length == hint(size):
        return expression(size)
    return str(length) if segment.expr.isdigit() else f"part of {segment.expr}"  # its length in the example is no constant
