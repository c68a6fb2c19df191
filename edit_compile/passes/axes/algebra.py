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


class WithoutRule(str):
    """A source that stands for an operator of which is not known where it puts positions. Its text is the operator's name."""

    __slots__ = ()


class FirstDim(str):
    """The source of an input's first dimension, mostly the batch. An image's output has it in common with all other inputs."""

    __slots__ = ()


@dataclass(frozen=True)
class AxisSegment:
    """A run of positions along an axis.

    Attributes:
        size: how many, in the example.
        expr: how many, as an expression in the sizes of the inputs.
        sources: names of the graph inputs it stems from, beside those of `composed_of`; a `WithoutRule` if some operator
            may have put the positions anywhere.
        composed_of: the axes it multiplies, outermost first; () if it was not merged from others.
        part_of: the segment that it was cut out of, and where; None if it is whole.
        in_order: whether one position of a source, or one of each of its axes, is behind every position, in their order.
    """

    size: int
    expr: str
    sources: frozenset[str] = frozenset()
    composed_of: tuple[Axis, ...] = ()
    part_of: Cut | None = None
    in_order: bool = True

    @property
    def all_sources(self) -> frozenset[str]:
        """Return the sources of the segment and of all that it is composed of."""
        return reduce(operator.or_, (segment.all_sources for axis in self.composed_of for segment in axis), self.sources)


@dataclass(frozen=True)
class Cut:
    """Where a segment was cut out of another: its first position and the first one behind it, in the example."""

    whole: AxisSegment
    start: int
    stop: int


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
    return (AxisSegment(hint(size), expression(size), sources_of(axes), in_order=False),)


def without_rule(shape: Iterable[Any], operator_name: str, operands: Iterable[Axes]) -> Axes:
    """Return the axes of a tensor of which is only known what it was computed from: any axis may stem from any of the operands'."""
    sources = sources_of(axis for axes in operands for axis in axes)
    sources |= {WithoutRule(operator_name)} if sources else set()
    return tuple((AxisSegment(hint(size), expression(size), sources, in_order=False),) for size in shape)


def operator_without_rule(axes: Iterable[Axis]) -> str | None:
    """Return the name of an operator without a rule that positions of the axes have come through; None if there is none."""
    return next((str(source) for source in sorted(sources_of(axes)) if isinstance(source, WithoutRule)), None)


def is_in_order(axis: Axis) -> bool:
    """Say whether every position of an axis stems from one position of each of its sources, in their order."""
    return all(segment.in_order and all(map(is_in_order, segment.composed_of)) for segment in axis)


def unify(a: Axis, b: Axis) -> Axis:
    """Merge two operands' axes for their common dimension: the finer division, the union of the sources."""
    if a == b:
        return a
    if [segment.size for segment in a] == [segment.size for segment in b]:
        return tuple(map(_unified, a, b))
    if not sources_of([b]):
        return a
    if not sources_of([a]):
        return b
    return a if len(a) >= len(b) else b


def summed(a: Axis, b: Axis) -> Axis:
    """Merge the axes of two summands. What an operator without a rule made of one's positions leaves that one's where they are."""
    for known, other in ((a, b), (b, a)):
        others = sources_of([other])
        real = {source for source in others if not isinstance(source, WithoutRule | FirstDim)}
        if (
            any(isinstance(source, WithoutRule) for source in others)
            and real <= sources_of([known])
            and operator_without_rule([known]) is None
        ):
            return known
    return unify(a, b)


def _unified(a: AxisSegment, b: AxisSegment) -> AxisSegment:
    """Merge two segments of one size. What either is composed of is kept, and no source is lost."""
    in_order = a.in_order and b.in_order
    if list(map(axis_size, a.composed_of)) == list(map(axis_size, b.composed_of)):
        factors = tuple(map(unify, a.composed_of, b.composed_of))
        part_of = a.part_of if a.part_of == b.part_of or not b.all_sources else b.part_of if not a.all_sources else None
        return replace(a, sources=a.sources | b.sources, composed_of=factors, part_of=part_of, in_order=in_order)
    kept, other = (a, b) if _tells_more(a, b) else (b, a)
    return replace(kept, sources=kept.sources | (other.all_sources - kept.all_sources), in_order=in_order)


def _tells_more(a: AxisSegment, b: AxisSegment) -> bool:
    """Say which of two divisions to keep: the one with sources, else the one with axes."""
    return bool(a.all_sources) if bool(a.all_sources) is not bool(b.all_sources) else bool(a.composed_of)


def samples_axis(samples: Sequence[Axis], size: Any, operator_name: str, *, from_end: bool = False) -> Axis:
    """Return the axis that samples of a batch lie along side by side, all from its start or all to its end.

    From the first segment on that is divided otherwise in one sample than in another, positions stand for something else in each.

    Args:
        size: of the result, that of the longest sample.
        operator_name: of the operator that padded the others.
    """
    step = -1 if from_end else 1
    common: list[AxisSegment] = []
    for segments in zip(*(axis[::step] for axis in samples), strict=False):
        if len(set(map(_division, segments))) > 1:
            break
        common.append(reduce(_unified, segments))
    rest = [axis[::step][len(common) :] for axis in samples]
    length = hint(size) - axis_size(tuple(common))
    if length:
        sources = sources_of(rest)
        sources |= {WithoutRule(f"{operator_name} of samples of different lengths")} if sources else set()
        known = "".join(f" - ({segment.expr})" for segment in common)
        common.append(AxisSegment(length, f"{expression(size)}{known}", sources, in_order=False))
    return tuple(common[::step])


def _division(segment: AxisSegment) -> tuple[Any, ...]:
    """Return the sizes of a segment and of all that it is composed of."""
    return (segment.size, *(tuple(map(_division, axis)) for axis in segment.composed_of))


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
    """Return positions start..stop of an axis. A segment that is cut through keeps its sources, and its axes if whole rows are left.

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
            segments.append(_part(segment, low - at, high - at, size))
        at += segment.size
    return tuple(segments) or new_axis(size)


def _part(segment: AxisSegment, start: int, stop: int, size: Any) -> AxisSegment:
    """Return positions start..stop of a segment."""
    cut = segment.part_of or Cut(segment, 0, segment.size)
    part = Cut(cut.whole, cut.start + start, cut.start + stop)
    expr = _length_of_part(segment, stop - start, size)
    rows = _rows(segment, start, stop, expr)
    return AxisSegment(stop - start, expr, segment.sources if rows else segment.all_sources, rows, part, segment.in_order)


def _rows(segment: AxisSegment, start: int, stop: int, expr: str) -> tuple[Axis, ...]:
    """Return the axes of positions start..stop of a merged segment, if they are whole steps along the outermost; else ().

    Args:
        expr: the number of positions; a constant one is a whole number of steps by chance unless the steps are constant.
    """
    if len(segment.composed_of) < 2 or not segment.size:
        return ()
    outermost, *inner = segment.composed_of
    step, exprs = segment.size // axis_size(outermost), [part.expr for axis in inner for part in axis]
    if start % step or stop % step or len(exprs) > len(inner) or (expr.isdigit() and not all(map(str.isdigit, exprs))):
        return ()
    count = (stop - start) // step
    if count == 1:
        return tuple(inner) if len(inner) > 1 else ()
    length = str(count) if all(part.expr.isdigit() for part in outermost) else f"({expr})//({'*'.join(f'({e})' for e in exprs)})"
    return ((AxisSegment(count, length, sources_of([outermost]), in_order=is_in_order(outermost)),), *inner)


def joined(segments: Iterable[AxisSegment]) -> Axis:
    """Return the axis of segments one behind the other; parts of one segment that are neighbours as they were become one again."""
    result: list[AxisSegment] = []
    for segment in segments:
        last = result[-1].part_of if result else None
        if segment.part_of and last and last.whole == segment.part_of.whole and last.stop == segment.part_of.start:
            result[-1] = _rejoined(result[-1], segment, Cut(last.whole, last.start, segment.part_of.stop))
        elif segment.size:
            result.append(segment)
    return tuple(result)


def _rejoined(a: AxisSegment, b: AxisSegment, cut: Cut) -> AxisSegment:
    """Join two neighbouring parts of one segment; what either stems from beside it, both do."""
    sources, whole = a.all_sources | b.all_sources | cut.whole.sources, cut.whole
    if (cut.start, cut.stop) == (0, whole.size):
        own = frozenset() if sources <= whole.all_sources else sources
        return replace(whole, sources=whole.sources | own, in_order=a.in_order and b.in_order)
    expr = f"{a.expr} + {b.expr}"
    if a.expr.isdigit() and b.expr.isdigit():
        expr = str(a.size + b.size)
    rows = _rows(whole, cut.start, cut.stop, expr)
    return AxisSegment(a.size + b.size, expr, sources, rows, cut, a.in_order and b.in_order)


def _length_of_part(segment: AxisSegment, length: int, size: Any) -> str:
    """Return the length of a part of a segment as an expression; its length in the example is not a constant."""
    if length == hint(size):
        return expression(size)
    return str(length) if segment.expr.isdigit() else f"part of {segment.expr}"
