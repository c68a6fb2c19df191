"""Rules of the operators that move positions without computing: views, joining, repeating, reordering, looking up, writing."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import fx

from edit_compile.passes.axes.algebra import (
    Axes,
    Axis,
    AxisSegment,
    axes_of,
    axis_size,
    entangled,
    expression,
    hint,
    joined,
    new_axis,
    reshape_axes,
    samples_axis,
    slice_axis,
    sources_of,
    unify,
)
from edit_compile.passes.axes.call import Call, aligned, size_of
from edit_compile.passes.graph_walk import argument, op_name, operand, operands

_STEPS = 100  # back from a part that is joined with others, to find where it was taken out

# ------------------------------------------------------------------ views


def reshaped(call: Call) -> Axes:
    """Keep the order of all numbers. A view as another dtype changes the last dimension."""
    if len(call.node.args) > 1 and isinstance(call.node.args[1], torch.dtype):
        last = call.first[-1:] if call.first and axis_size(call.first[-1]) == hint(call.shape[-1]) else None
        return call.first if last else (*call.first[:-1], entangled(call.shape[-1], call.first[-1]))
    return reshape_axes(call.first, call.shape)


def permuted(call: Call) -> Axes:
    return tuple(call.first[dim] for dim in call.argument("dims"))


def transposed(call: Call) -> Axes:
    """Swap two dimensions: transpose, swapaxes; of a matrix t, numpy_T."""
    axes = list(call.first)
    if len(axes) < 2:
        return tuple(axes)
    a, b = call.node.args[1:3] if len(call.node.args) > 1 else (0, 1)
    assert isinstance(a, int)
    assert isinstance(b, int)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def reversed_dims(call: Call) -> Axes:
    return call.first[::-1]


def matrix_transposed(call: Call) -> Axes:
    """Swap the last two dimensions: mT, mH, adjoint."""
    return (*call.first[:-2], *reversed(call.first[-2:]))


def dims_moved(call: Call) -> Axes:
    rank = len(call.shape)
    ends = (
        [dim % rank for dim in (d if isinstance(d, list | tuple) else [d])] for d in (call.argument("source"), call.argument("destination"))
    )
    sources, targets = ends
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(dim for dim in range(rank) if dim not in sources)
    return tuple(call.first[moved[dim] if dim in moved else next(rest)] for dim in range(rank))


def unsqueezed(call: Call) -> Axes:
    dim = int(call.argument("dim")) % len(call.shape)
    return (*call.first[:dim], new_axis(1), *call.first[dim:])


def squeezed(call: Call) -> Axes:
    gone = call.dims() if call.argument("dim") is not None else set(range(len(call.first)))
    return tuple(axis for dim, axis in enumerate(call.first) if dim not in gone or axis_size(axis) != 1)


def without_dim(call: Call) -> Axes:
    """Drop a dimension: select, unbind."""
    return tuple(axis for dim, axis in enumerate(call.first) if dim != call.dim())


def sliced(call: Call) -> Axes:
    axes, dim = list(call.first), call.dim()
    length, size = axis_size(axes[dim]), call.shape[dim]
    start, stop = call.position("start", 0, length), call.position("end", length, length)
    axes[dim] = _cut(axes[dim], start, stop, size) if call.argument("step", 1) == 1 else entangled(size, axes[dim])
    return tuple(axes)


def _cut(axis: Axis, start: int, stop: int, size: Any) -> Axis:
    """Return positions start..stop of an axis; which ones they are is unknown where only the data tells how many."""
    exact = stop - start == hint(size) and stop <= axis_size(axis)
    return slice_axis(axis, start, stop, size) if exact else entangled(size, axis)


def narrowed(call: Call) -> Axes:
    axes, dim = list(call.first), call.dim()
    size, length = call.shape[dim], axis_size(axes[dim])
    if isinstance(start := call.argument("start"), fx.Node) and isinstance(start.meta.get("val"), torch.Tensor):
        axes[dim] = entangled(size, axes[dim])  # a start that is data
    else:
        at = call.position("start", 0, length)
        axes[dim] = _cut(axes[dim], at, at + hint(size), size)
    return tuple(axes)


def split(call: Call) -> Axes:
    """Start each output where the ones before it end: chunk, split, tensor_split and their kind."""
    name = op_name(call.node)
    fixed = {"hsplit": min(1, len(call.first) - 1), "vsplit": 0, "dsplit": 2}
    axes, dim = list(call.first), fixed[name] if name in fixed else call.dim()
    start = sum(hint(tensor.shape[dim]) for tensor in call.node.meta["val"][: call.output])
    size = call.shape[dim]
    axes[dim] = _cut(axes[dim], start, start + hint(size), size)
    return tuple(axes)


def expanded(call: Call) -> Axes:
    """Repeat dimensions of size 1, and make new ones in front: expand, broadcast_to."""
    return aligned(call.shape, [call.first])


def broadcast_list(call: Call) -> Axes:
    return aligned(call.shape, [call.listed(0)[call.output]])


def meshgrid(call: Call) -> Axes:
    lines = [axes[0] if axes else new_axis(1) for axes in call.listed(0)]
    if call.argument("indexing", "ij") == "xy" and len(lines) > 1:
        lines[:2] = reversed(lines[:2])
    return tuple(lines)


def complex_parts(call: Call) -> Axes:
    """Drop or add the last dimension, of the real and the imaginary part: view_as_complex, view_as_real."""
    return call.first[:-1] if len(call.first) > len(call.shape) else (*call.first, new_axis(call.shape[-1]))


def diagonal(call: Call) -> Axes:
    """Put the places where two dimensions have the same position last."""
    a, b = sorted((call.dim("dim1", 0), call.dim("dim2", 1)))
    return (*call.first[:a], *call.first[a + 1 : b], *call.first[b + 1 :], entangled(call.shape[-1], call.first[a], call.first[b]))


def on_diagonal(call: Call) -> Axes:
    """Put the last dimension's positions where two new ones have the same position: diag_embed."""
    new = sorted(int(call.argument(name)) % len(call.shape) for name in ("dim1", "dim2"))
    rest = iter(call.first[:-1])
    return tuple(entangled(size, call.first[-1]) if d in new else next(rest) for d, size in enumerate(call.shape))


def windows(call: Call) -> Axes:
    """Cut windows along one dimension, as Tensor.unfold does: their content is a new last one."""
    axes, dim = call.first, call.dim("dimension")
    return (*axes[:dim], entangled(call.shape[dim], axes[dim]), *axes[dim + 1 :], entangled(call.shape[-1], axes[dim]))


# ------------------------------------------------------------------ joining


def joined_along(call: Call) -> Axes:
    """Join tensors one behind the other: cat, concat, hstack, vstack, dstack."""
    rank, name = len(call.shape), op_name(call.node)
    fixed = {"hstack": min(1, rank - 1), "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2}
    dim = fixed[name] if name in fixed else int(call.argument("dim", 0)) % rank
    parts = [_of_rank(axes, rank, name) for axes in call.listed(0) if name in fixed or len(axes) == rank]
    put_back = _put_back(call, call.shape[dim]) if all(part[dim] == new_axis(1) for part in parts) else None
    along = put_back or joined(segment for part in parts for segment in part[dim])
    if axis_size(along) != hint(call.shape[dim]):  # of parts whose sizes only the data tells
        along = entangled(call.shape[dim], *(part[dim] for part in parts))
    return tuple(along if d == dim else reduce(unify, (part[d] for part in parts)) for d in range(rank))


def _of_rank(axes: Axes, rank: int, name: str) -> Axes:
    """Give a tensor the dimensions of size 1 that stacking gives it."""
    one = new_axis(1)
    if len(axes) == rank:
        return axes
    if name == "column_stack":
        return (*axes, one)
    if name == "dstack":
        return (one, *axes, one) if len(axes) == 1 else (*axes, one)
    return (one, *axes)


def stacked(call: Call) -> Axes:
    parts, dim = call.listed(0), int(call.argument("dim", 0)) % len(call.shape)
    common = [reduce(unify, (part[d] for part in parts)) for d in range(len(call.shape) - 1)]
    return (*common[:dim], _put_back(call, call.shape[dim]) or new_axis(call.shape[dim]), *common[dim:])


def _put_back(call: Call, size: Any) -> Axis | None:
    """Return the axis that parts of one position each lie along: that of a tensor which they were taken out of, one by one.

    None if they come from elsewhere, or along an axis that stems from no input.
    """
    found = [_taken_from(part) for part in operands(call.node, 0)]
    if None in found or len({each[:2] for each in found if each is not None}) != 1:
        return None
    source, dim = next(each[:2] for each in found if each is not None)
    axes = call.axes.get(source)
    if not isinstance(axes, tuple) or not sources_of([axes[dim]]):
        return None
    in_order = [each[2] for each in found if each is not None] == list(range(axis_size(axes[dim])))
    return axes[dim] if in_order else entangled(size, axes[dim])


def _taken_from(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Find the tensor that a part was selected from, along its first operands: with the dimension and the position."""
    for _ in range(_STEPS):
        taken = operand(node, 0) if node.target is operator.getitem else node
        if op_name(taken) in ("select", "unbind"):
            source, index = operand(taken, 0), argument(node, 1 if taken is not node else 2, "index")
            while op_name(source) == "slice" and source.meta["val"].shape == operand(source, 0).meta["val"].shape:
                source = operand(source, 0)  # all of it, as `x[:, i]` takes first
            rank = source.meta["val"].ndim
            return (source, argument(taken, 1, "dim", 0) % rank, index) if isinstance(index, int) else None
        if node.op != "call_function" or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return None


def samples_padded(call: Call) -> Axes:
    """Stack samples of several lengths, the shorter ones padded: pad_sequence, of (length, ...) to (batch, length, ...)."""
    samples = call.listed(0)
    in_front, batch_first = call.argument("padding_side", "right") == "left", bool(call.argument("batch_first", False))
    tokens = samples_axis([axes[0] for axes in samples], call.shape[1 if batch_first else 0], "aten.pad_sequence", from_end=in_front)
    rest = [reduce(unify, each) for each in zip(*(axes[1:] for axes in samples), strict=True)]
    batch = new_axis(len(samples))
    return (batch, tokens, *rest) if batch_first else (tokens, batch, *rest)


def padded(call: Call) -> Axes:
    """Put positions before and behind: beside merged or joined tokens they are of their own, an image's dimension grows."""
    amounts = [size_of(each) for each in call.argument("pad", call.argument("padding"))]
    constant = "constant" in op_name(call.node) or call.argument("mode") == "constant"
    result = list(call.first)
    for back, (before, behind) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), 1):
        axis, size = result[-back], call.shape[-back]
        several = len(axis) > 1 or bool(axis[0].composed_of)
        if (before, behind) != (0, 0):
            exact = constant and several and min(before, behind) >= 0
            result[-back] = joined((*_new(before), *axis, *_new(behind))) if exact else entangled(size, axis)
    return tuple(result)


def _new(count: int) -> Axis:
    return (AxisSegment(count, f"padding of {count}"),) if count else ()


def repeated(call: Call) -> Axes:
    """Lay copies side by side, along every dimension: repeat, tile."""
    return tuple(_copies(axis, size, inner=False) for axis, size in zip(_with_lead(call), call.shape, strict=True))


def _with_lead(call: Call) -> Axes:
    lead = len(call.shape) - len(call.first)
    return (*(new_axis(1) for _ in range(lead)), *call.first)


def interleaved(call: Call) -> Axes:
    """Repeat every position in place, a given number of times. Where the numbers are data, or a dimension is not named, they mix."""
    dim = call.argument("dim")
    if dim is None or not call.tensors:
        return tuple(entangled(size, *(axis for axes in call.tensors for axis in axes)) for size in call.shape)
    axes, at = list(call.first), call.dim()
    repeats = call.argument("repeats")
    by_data = isinstance(repeats, fx.Node) and isinstance(repeats.meta.get("val"), torch.Tensor)
    axes[at] = entangled(call.shape[at], axes[at]) if by_data else _copies(axes[at], call.shape[at], inner=True)
    return tuple(axes)


def _copies(axis: Axis, size: Any, *, inner: bool) -> Axis:
    length = axis_size(axis)
    if length == hint(size):
        return axis
    if length == 1 or not length:
        return new_axis(size)
    copies = new_axis(hint(size) // length)
    return (AxisSegment(hint(size), expression(size), composed_of=(axis, copies) if inner else (copies, axis)),)


# ------------------------------------------------------------------ reordering


def reordered(call: Call, dims: set[int] | None = None) -> Axes:
    """Keep the sources, in another order: flip, sort, topk, index_select."""
    along = call.dims() if dims is None else dims
    pairs = enumerate(zip(call.shape, call.first, strict=True))
    return tuple(entangled(size, axis) if dim in along else axis for dim, (size, axis) in pairs)


def flipped(call: Call) -> Axes:
    fixed = {"fliplr": {1}, "flipud": {0}, "msort": {0}}
    return reordered(call, fixed.get(op_name(call.node)) or call.dims("dims"))


def sorted_along(call: Call) -> Axes:
    """Sort along a dimension, the last if none is named: sort, argsort, topk."""
    return reordered(call, call.dims(default=-1))


def rolled(call: Call) -> Axes:
    """Move positions round: roll, fftshift. Without dimensions roll moves the flattened tensor."""
    dims = call.argument("dims", call.argument("dim"))
    if dims:
        return reordered(call, call.dims("dims" if call.argument("dims") else "dim"))
    return tuple(entangled(size, *call.first) for size in call.shape)


def rotated(call: Call) -> Axes:
    a, b = (dim % len(call.first) for dim in call.argument("dims", (0, 1)))
    axes = list(call.first)
    for dim in (a, b):
        axes[dim] = entangled(call.shape[dim], call.first[a], call.first[b])
    return tuple(axes)


def channels_shuffled(call: Call) -> Axes:
    return reordered(call, {1})


# ------------------------------------------------------------------ looking up


def embedded(call: Call) -> Axes:
    """Look rows up: embedding. One-hot numbers likewise have a new last dimension."""
    return (*(call.of(1) if op_name(call.node) == "embedding" else call.first), new_axis(call.shape[-1]))


def gathered(call: Call) -> Axes:
    """Take positions along a dimension, those that an index of the result's shape names: gather, take_along_dim."""
    index = call.tensor("index") or call.tensor("indices")
    assert index is not None
    if call.argument("dim") is None:
        return tuple(entangled(size, *call.first, *index) for size in call.shape)
    dim = call.dim()
    result = []
    for d, size in enumerate(call.shape):
        if d == dim:
            result.append(entangled(size, call.first[d], index[d]))
        else:
            own = call.first[d]
            kept = own if axis_size(own) == hint(size) else slice_axis(own, 0, hint(size), size)
            result.append(index[d] if axis_size(own) == 1 else kept)
    return tuple(result)


def selected(call: Call) -> Axes:
    """Take positions along a dimension, those that a list names: index_select."""
    index = call.tensor("index")
    dim, lists = call.dim(), index if index else (new_axis(1),)
    return tuple(
        entangled(size, axis, *lists) if d == dim else axis for d, (size, axis) in enumerate(zip(call.shape, call.first, strict=True))
    )


def indexed(call: Call) -> Axes:
    """Index with tensors: the indexed dimensions become the indices', in front where they are not neighbours; the rest stays."""
    axes, given = call.of(0), call.argument("indices")
    indices: dict[int, fx.Node] = {}
    used: list[int] = []
    dim = 0
    for each in given:
        width = _indexed_dims(each)
        if each is not None:
            indices[dim] = each
            used += range(dim, dim + width)
        dim += width
    inner = len(call.shape) - (len(axes) - len(used))  # dimensions of the indices, broadcast
    neighbours = used == list(range(used[0], used[-1] + 1))
    at = used[0] if neighbours else 0
    rest = [axis for d, axis in enumerate(axes) if d not in used]
    taken_from = [axes[d] for d in used]
    looked_up = _looked_up(call, [indices[d] for d in indices], call.shape[at : at + inner], taken_from)
    return (*rest[:at], *looked_up, *rest[at:])


def _indexed_dims(index: Any) -> int:
    """Count the dimensions that an index takes the place of: a boolean one stands for as many as it has."""
    value = index.meta["val"] if isinstance(index, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8) else 1


def _looked_up(call: Call, indices: list[fx.Node], shape: tuple[Any, ...], taken_from: list[Axis]) -> list[Axis]:
    known = [axes_of(index, call.axes) for index in indices]
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices):
        return [entangled(size, *taken_from, *(axis for axes in known for axis in axes)) for size in shape]
    sources = sources_of(taken_from)
    return [
        tuple(replace(segment, sources=segment.sources | sources, in_order=False) for segment in axis) for axis in aligned(shape, known)
    ]


def taken(call: Call) -> Axes:
    """Look numbers up in the flattened tensor: take."""
    sources = sources_of(call.first)
    return tuple(tuple(replace(segment, sources=segment.sources | sources, in_order=False) for segment in axis) for axis in call.of(1))


# ------------------------------------------------------------------ writing


def kept(call: Call) -> Axes:
    """Keep the first tensor's positions: what is written is not by position, or makes no difference to them."""
    return call.first


def copied(call: Call) -> Axes:
    """Overwrite the first tensor with the second: copy."""
    return aligned(call.shape, [call.of(1)])


_ADDING = ("scatter_add", "index_add", "scatter_add_", "index_add_")


def written(call: Call) -> Axes:
    """Write into some positions: index_put, scatter and their kind; what is added to positions leaves them what they are: index_add."""
    if op_name(call.node) in _ADDING and sources_of(call.first):
        return call.first
    values = [found for name in ("values", "src", "source") if (found := call.tensor(name)) is not None]
    along = call.dims() if call.argument("dim") is not None else _written_dims(call)
    return _overlaid(call, values[0], along) if values else call.first


def _written_dims(call: Call) -> set[int]:
    given = call.argument("indices", ())
    return {dim for dim, index in enumerate(given) if index is not None} if isinstance(given, list | tuple) else set()


def _overlaid(call: Call, values: Axes, along: set[int]) -> Axes:
    """Return the first tensor's axes with those of written values, aligned from the right, beside them; mixed along some dimensions."""
    result = list(call.first)
    for back in range(1, min(len(result), len(values)) + 1):
        own, other = result[-back], values[-back]
        if len(result) - back in along:
            result[-back] = entangled(call.shape[-back], own, other)
        elif axis_size(own) == axis_size(other):
            result[-back] = unify(own, other)
    return tuple(result)


def slice_written(call: Call) -> Axes:
    """Write into a run of positions: slice_scatter."""
    axes, values, dim = call.first, call.of(1), call.dim()
    length = axis_size(axes[dim])
    start, stop = call.position("start", 0, length), call.position("end", length, length)
    exact = call.argument("step", 1) == 1 and len(values) == len(axes)
    return run_written(axes, values, dim, start, stop) if exact else _overlaid(call, values, {dim})


def run_written(axes: Axes, values: Axes, dim: int, start: int, stop: int) -> Axes:
    """Return the axes of a tensor whose positions start..stop along a dimension were overwritten."""
    own = axes[dim]
    before, behind = slice_axis(own, 0, start, -1), slice_axis(own, stop, axis_size(own), -1)  # of no size that is known here
    whole = joined(segment for part in (before, values[dim], behind) for segment in part if segment.size > 0)
    return tuple(
        whole if d == dim else unify(a, b) if axis_size(a) == axis_size(b) else a for d, (a, b) in enumerate(zip(axes, values, strict=True))
    )


def place_written(call: Call) -> Axes:
    """Write at one position of a dimension: select_scatter."""
    dim, values = call.dim(), call.of(1)
    rest = iter(values)
    return tuple(
        axis if d == dim else unify(axis, other) if axis_size(other := next(rest)) == axis_size(axis) else axis
        for d, axis in enumerate(call.first)
    )


def created(call: Call) -> Axes:
    """Make a tensor from nothing but sizes and numbers."""
    return tuple(new_axis(size) for size in call.shape)
