"""What every operation does to axes: one rule for each, from a call of it to the axes of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import fx

from edit_compile.passes.axes.algebra import (
    Axes,
    Axis,
    Value,
    axes_of,
    axis_size,
    entangled,
    hint,
    new_axis,
    reshape_axes,
    slice_axis,
    sources_of,
    unify,
)
from edit_compile.passes.graph_walk import argument, number, numbers, op_name, operand, operands


@dataclass(frozen=True)
class Call:
    """One output of an operation in a graph.

    Attributes:
        axes: of the nodes before it.
        shape: of this output, sizes symbolic.
        output: which of the operation's outputs.
    """

    node: fx.Node
    axes: Mapping[fx.Node, Value]
    shape: tuple[Any, ...]
    output: int = 0

    @property
    def first(self) -> Axes:
        """Return the first tensor's axes."""
        return axes_of(self.node.all_input_nodes[0], self.axes)

    def of(self, index: int) -> Axes:
        """Return the axes of the tensor that is a positional argument."""
        return axes_of(operand(self.node, index), self.axes)

    def listed(self, index: int) -> list[Axes]:
        """Return the axes of the tensors in the list that is a positional argument."""
        return [axes_of(each, self.axes) for each in operands(self.node, index)]

    @property
    def tensors(self) -> list[Axes]:
        """Return the axes of all operands that are one tensor."""
        return [found for each in self.node.all_input_nodes if isinstance(found := self.axes.get(each), tuple)]

    def dim(self, index: int = 1) -> int:
        """Return the dimension that is an argument, 0 by default, counted from the front of the first tensor."""
        return number(self.node, index, "dim", 0) % len(self.first)

    def dims(self, index: int, name: str = "dim") -> set[int]:
        """Return the dimensions that are an argument, counted from the front of the first tensor."""
        return {dim % len(self.first) for dim in numbers(self.node, index, name)}


Rule = Callable[[Call], Axes]


def same_positions(call: Call) -> Axes:
    """Align dimensions from the right, size 1 broadcasts: pointwise operations and whatever else keeps shapes.

    A dimension that no operand has at this place, of an operation without a rule, comes from the operands' others of its size.
    """
    result = []
    for from_right in range(len(call.shape), 0, -1):
        size = call.shape[-from_right]
        candidates = [t[-from_right] for t in call.tensors if len(t) >= from_right and axis_size(t[-from_right]) == hint(size)]
        result.append(reduce(unify, candidates) if candidates else _of_that_size(call, size))
    return tuple(result)


def _of_that_size(call: Call, size: Any) -> Axis:
    same = [axis for axes in call.tensors for axis in axes if axis_size(axis) == hint(size) != 1]
    return entangled(size, *same) if same else new_axis(size)


def _first_tensor(call: Call) -> Axes:
    return call.first if len(call.first) == len(call.shape) else same_positions(call)


def _created(call: Call) -> Axes:
    return tuple(new_axis(size) for size in call.shape)


# ------------------------------------------------------------------ views


def _reshape(call: Call) -> Axes:
    return reshape_axes(call.first, call.shape)


def _permute(call: Call) -> Axes:
    return tuple(call.first[dim] for dim in numbers(call.node, 1, "dims"))


def _transpose(call: Call) -> Axes:
    axes = list(call.first)
    a, b = (number(call.node, 1, "dim0"), number(call.node, 2, "dim1")) if len(call.node.args) > 1 else (0, 1)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _matrix_transpose(call: Call) -> Axes:
    """Swap the last two dimensions: mT, mH, adjoint; T of a matrix."""
    return (*call.first[:-2], *reversed(call.first[-2:]))


def _movedim(call: Call) -> Axes:
    rank = len(call.shape)
    sources, targets = ([dim % rank for dim in numbers(call.node, index)] for index in (1, 2))
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(dim for dim in range(rank) if dim not in sources)
    return tuple(call.first[moved[dim] if dim in moved else next(rest)] for dim in range(rank))


def _unsqueeze(call: Call) -> Axes:
    dim = number(call.node, 1, "dim") % len(call.shape)
    return (*call.first[:dim], new_axis(1), *call.first[dim:])


def _squeeze(call: Call) -> Axes:
    named = argument(call.node, 1, "dim") is not None
    gone = call.dims(1) if named else set(range(len(call.first)))
    return tuple(axis for dim, axis in enumerate(call.first) if dim not in gone or axis_size(axis) != 1)


def _without_dim(call: Call) -> Axes:
    """Drop a dimension: select, unbind."""
    return tuple(axis for dim, axis in enumerate(call.first) if dim != call.dim())


def _slice(call: Call) -> Axes:
    axes, dim = list(call.first), call.dim()
    length, size = axis_size(axes[dim]), call.shape[dim]
    start, stop = _position(argument(call.node, 2, "start"), 0, length), _position(argument(call.node, 3, "end"), length, length)
    every_one = argument(call.node, 4, "step", 1) == 1
    axes[dim] = slice_axis(axes[dim], start, stop, size) if every_one else entangled(size, axes[dim])
    return tuple(axes)


def _position(value: Any, default: int, length: int) -> int:
    if value is None:
        return default
    position = hint(value.meta["val"]) if isinstance(value, fx.Node) else hint(value)
    return max(0, position + length if position < 0 else min(position, length))


def _cut(call: Call) -> Axes:
    """Start each output where the ones before it end: chunk, split, split_with_sizes."""
    axes, dim = list(call.first), call.dim(2)
    start = sum(hint(tensor.shape[dim]) for tensor in call.node.meta["val"][: call.output])
    size = call.shape[dim]
    axes[dim] = slice_axis(axes[dim], start, start + hint(size), size)
    return tuple(axes)


def _expand(call: Call) -> Axes:
    lead = len(call.shape) - len(call.first)
    aligned: list[Axis | None] = [*[None] * lead, *call.first]
    return tuple(
        axis if axis is not None and axis_size(axis) == hint(size) else new_axis(size)
        for axis, size in zip(aligned, call.shape, strict=True)
    )


def _complex(call: Call) -> Axes:
    """Drop or add the last dimension, of the real and the imaginary part: view_as_complex, view_as_real."""
    return call.first[:-1] if len(call.first) > len(call.shape) else (*call.first, new_axis(call.shape[-1]))


# ------------------------------------------------------------------ joining


def _cat(call: Call) -> Axes:
    rank = len(call.shape)
    parts = [axes for axes in call.listed(0) if len(axes) == rank]
    joined = number(call.node, 1, "dim", 0) % rank
    return tuple(
        tuple(segment for part in parts for segment in part[dim] if segment.size)
        if dim == joined
        else reduce(unify, (part[dim] for part in parts))
        for dim in range(rank)
    )


def _stack(call: Call) -> Axes:
    parts, dim = call.listed(0), number(call.node, 1, "dim", 0) % len(call.shape)
    common = [reduce(unify, (part[d] for part in parts)) for d in range(len(call.shape) - 1)]
    return (*common[:dim], new_axis(call.shape[dim]), *common[dim:])


# ------------------------------------------------------------------ products


def _linear(call: Call) -> Axes:
    return (*call.of(0)[:-1], new_axis(call.shape[-1]))


def _matmul(call: Call) -> Axes:
    """Multiply (..., rows, summed) by (..., summed, columns); vectors have neither rows nor columns. A bias comes before both."""
    count = len(call.node.args)
    left, right = call.of(count - 2), call.of(count - 1)
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    batch = call.shape[: len(call.shape) - len(rows) - len(columns)]
    lead = []
    for from_right in range(len(batch), 0, -1):
        at, size = -2 - from_right, batch[-from_right]
        found = [axes[at] for axes in (left, right) if len(axes) >= -at and axis_size(axes[at]) == hint(size)]
        lead.append(found[0] if found else new_axis(size))
    return (*lead, *rows, *columns)


def _attention(call: Call) -> Axes:
    return (*call.of(0)[:-1], call.of(2)[-1])


def _einsum(call: Call) -> Axes:
    terms, _, result = str(call.node.args[0]).replace(" ", "").partition("->")
    if "." in terms or len(result) != len(call.shape):
        return _created(call)
    letters: dict[str, Axis] = {}
    for term, axes in zip(terms.split(","), call.listed(1), strict=True):
        letters = dict(zip(term, axes, strict=False)) | letters
    return tuple(letters.get(letter) or new_axis(size) for letter, size in zip(result, call.shape, strict=True))


def _outer(call: Call) -> Axes:
    return (call.of(0)[0], call.of(1)[0])


# ------------------------------------------------------------------ neighbourhoods


def _convolution(call: Call) -> Axes:
    """Derive each output position from the input positions of its own dimension: (B, C, ...) to (B, C', ...)."""
    image = call.of(0)
    if len(image) != len(call.shape):
        return _created(call)
    return (image[0], new_axis(call.shape[1]), *(entangled(s, axis) for s, axis in zip(call.shape[2:], image[2:], strict=True)))


def _padded(call: Call) -> Axes:
    return tuple(axis if axis_size(axis) == hint(s) else entangled(s, axis) for s, axis in zip(call.shape, call.first, strict=True))


def _im2col(call: Call) -> Axes:
    """Cut into patches, as F.unfold does: (B, C, H, W) to (B, C * patch, patches)."""
    image = call.first
    return (*image[:-3], *map(new_axis, call.shape[len(image) - 3 : -1]), entangled(call.shape[-1], *image[-2:]))


def _unfold(call: Call) -> Axes:
    """Cut windows along one dimension, as Tensor.unfold does: their content is a new last one."""
    axes, dim = call.first, call.dim()
    return (*axes[:dim], entangled(call.shape[dim], axes[dim]), *axes[dim + 1 :], entangled(call.shape[-1], axes[dim]))


# ------------------------------------------------------------------ reordering, reducing, looking up


def _reordered(call: Call) -> Axes:
    """Keep the sources, in another order: flip, gather, index_select."""
    return _entangled_along(call, call.dims(1))


def _rolled(call: Call) -> Axes:
    """Keep the sources, in another order: roll. Without dimensions it rolls the flattened tensor."""
    if argument(call.node, 2, "dims"):
        return _entangled_along(call, call.dims(2, "dims"))
    return tuple(entangled(size, *call.first) for size in call.shape)


def _entangled_along(call: Call, dims: set[int]) -> Axes:
    along = enumerate(zip(call.shape, call.first, strict=True))
    return tuple(entangled(size, axis) if dim in dims else axis for dim, (size, axis) in along)


def _reduction(call: Call) -> Axes:
    index = 2 if op_name(call.node) == "linalg_vector_norm" else 1  # a norm's order comes first
    dims = argument(call.node, index, "dim")
    if dims is None or isinstance(dims, bool):
        return _created(call)
    gone = call.dims(index)
    if len(call.shape) == len(call.first):
        return tuple(new_axis(s) if dim in gone else call.first[dim] for dim, s in enumerate(call.shape))
    return tuple(axis for dim, axis in enumerate(call.first) if dim not in gone)


def _embedding(call: Call) -> Axes:
    return (*call.of(1), new_axis(call.shape[-1]))


def _index(call: Call) -> Axes:
    """Gather by index tensors: the indexed dimensions become the indices', the rest stay."""
    axes, given = call.of(0), argument(call.node, 1, "indices")
    indices = {dim: call.axes.get(index) for dim, index in enumerate(given) if index is not None}
    known = [index for index in indices.values() if isinstance(index, tuple)]
    used = list(indices)
    adjacent = bool(used) and used == list(range(used[0], used[-1] + 1))
    if not adjacent or len(known) < len(used):
        return _created(call)
    inner = len(call.shape) - (len(axes) - len(used))  # dimensions of the indices, broadcast
    taken_from = sources_of(axes[dim] for dim in used)
    broadcast = [reduce(unify, [index[k - inner] for index in known if len(index) >= inner - k]) for k in range(inner)]
    looked_up = [tuple(replace(segment, sources=segment.sources | taken_from) for segment in axis) for axis in broadcast]
    return (*axes[: used[0]], *looked_up, *axes[used[-1] + 1 :])


_RULES: dict[Rule, str] = {
    _reshape: "view reshape _unsafe_view flatten unflatten _reshape_alias",
    _permute: "permute",
    _transpose: "transpose t swapaxes swapdims",
    _matrix_transpose: "mT mH adjoint matrix_H",
    _movedim: "movedim moveaxis",
    _unsqueeze: "unsqueeze",
    _squeeze: "squeeze",
    _without_dim: "select unbind",
    _slice: "slice",
    _cut: "chunk split split_with_sizes",
    _expand: "expand",
    _complex: "view_as_complex view_as_real",
    _cat: "cat concat",
    _stack: "stack",
    _linear: "linear",
    _matmul: "matmul bmm mm addmm baddbmm",
    _attention: "scaled_dot_product_attention",
    _einsum: "einsum",
    _outer: "outer",
    _convolution: """conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d pixel_shuffle pixel_unshuffle
        avg_pool1d avg_pool2d avg_pool3d max_pool2d adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d""",
    _padded: "pad constant_pad_nd",
    _im2col: "im2col",
    _unfold: "unfold",
    _reordered: "flip gather index_select",
    _rolled: "roll",
    _reduction: "mean sum amax amin any all argmax var std linalg_vector_norm",
    _embedding: "embedding",
    _index: "index",
    _created: "zeros ones full arange empty rand randn linspace eye",
    _first_tensor: """slice_scatter select_scatter copy copy_ index_put scatter masked_fill layer_norm rms_norm native_layer_norm group_norm
        type_as dropout softmax _softmax zeros_like ones_like empty_like full_like""",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _RULES.items() for name in names.split()}
