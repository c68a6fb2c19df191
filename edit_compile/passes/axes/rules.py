"""What every operation does to axes: one rule an operation, (node, axes so far, output shape, output index) -> the output's axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import fx

from edit_compile.passes.axes.algebra import (
    Axes,
    Axis,
    Value,
    axis_size,
    entangled,
    hint,
    new_axis,
    reshape_axes,
    slice_axis,
    sources_of,
    unify,
)


def operation(target: Any) -> str:
    """An operator's name without namespace and overload."""
    return getattr(target, "_opname", None) or (target._schema.name.split("::")[1] if hasattr(target, "_schema") else str(target))


def operand_axes(node: fx.Node, axes: Mapping[fx.Node, Value]) -> list[Axes]:
    return [axes[n] for n in node.all_input_nodes if isinstance(axes.get(n), tuple)]


def same_positions(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    """Pointwise operations and whatever else keeps shapes: dimensions align from the right, size 1 broadcasts."""
    operands = operand_axes(node, axes)
    result = []
    for from_right in range(len(shape), 0, -1):
        size = hint(shape[-from_right])
        candidates = [o[-from_right] for o in operands if len(o) >= from_right and axis_size(o[-from_right]) == size]
        result.append(reduce(unify, candidates) if candidates else new_axis(shape[-from_right]))
    return tuple(result)


def _keep(node: fx.Node, axes: Mapping[fx.Node, Value]) -> Axes:
    return axes[node.all_input_nodes[0]]


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _reshape(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    return reshape_axes(_keep(node, axes), shape)


def _permute(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = _keep(node, axes)
    return tuple(kept[d] for d in _arg(node, 1, "dims"))


def _transpose(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = list(_keep(node, axes))
    a, b = (_arg(node, 1, "dim0"), _arg(node, 2, "dim1")) if len(node.args) > 1 else (0, 1)
    kept[a], kept[b] = kept[b], kept[a]
    return tuple(kept)


def _unsqueeze(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept, dim = list(_keep(node, axes)), _arg(node, 1, "dim") % len(shape)
    return (*kept[:dim], new_axis(1), *kept[dim:])


def _squeeze(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = _keep(node, axes)
    dims = _arg(node, 1, "dim", range(len(kept)))
    gone = {d % len(kept) for d in ([dims] if isinstance(dims, int) else dims)}
    return tuple(a for d, a in enumerate(kept) if d not in gone or axis_size(a) != 1)


def _select(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = _keep(node, axes)
    dim = _arg(node, 1, "dim", 0) % len(kept)
    return tuple(a for d, a in enumerate(kept) if d != dim)


def _unbind(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = _keep(node, axes)
    dim = _arg(node, 1, "dim", 0) % len(kept)
    return tuple(a for d, a in enumerate(kept) if d != dim)


def _slice(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = list(_keep(node, axes))
    dim = _arg(node, 1, "dim", 0) % len(kept)
    length = axis_size(kept[dim])
    start, stop = _position(_arg(node, 2, "start"), 0, length), _position(_arg(node, 3, "end"), length, length)
    if _arg(node, 4, "step", 1) != 1:
        kept[dim] = entangled(shape[dim], kept[dim])
    else:
        kept[dim] = slice_axis(kept[dim], start, stop, shape[dim])
    return tuple(kept)


def _position(value: Any, default: int, length: int) -> int:
    if value is None:
        return default
    number = hint(value.meta["val"]) if isinstance(value, fx.Node) else hint(value)
    return max(0, number + length if number < 0 else min(number, length))


def _split_sizes(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], index: int) -> Axes:
    """chunk, split, split_with_sizes: output `index` starts where the ones before it end."""
    kept = list(_keep(node, axes))
    dim = _arg(node, 2, "dim", 0) % len(kept)
    outputs = node.meta["val"]
    start = sum(hint(v.shape[dim]) for v in outputs[:index])
    kept[dim] = slice_axis(kept[dim], start, start + hint(shape[dim]), shape[dim])
    return tuple(kept)


def _cat(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    parts = [axes[n] for n in node.args[0] if len(axes[n]) == len(shape)]
    dim = _arg(node, 1, "dim", 0) % len(shape)
    result = []
    for d in range(len(shape)):
        if d == dim:
            result.append(tuple(p for part in parts for p in part[d] if p.size))
        else:
            result.append(reduce(unify, (part[d] for part in parts)))
    return tuple(result)


def _stack(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    parts = [axes[n] for n in node.args[0]]
    dim = _arg(node, 1, "dim", 0) % len(shape)
    common = [reduce(unify, (part[d] for part in parts)) for d in range(len(shape) - 1)]
    return (*common[:dim], new_axis(shape[dim]), *common[dim:])


def _linear(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    return (*axes[node.args[0]][:-1], new_axis(shape[-1]))


def _matmul(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    a, b = (axes[n] for n in node.args[-2:])
    rows, columns = (a[-2] if len(a) > 1 else None), (b[-1] if len(b) > 1 else None)
    batch = len(shape) - (rows is not None) - (columns is not None)
    lead = [new_axis(s) for s in shape[:batch]]
    for d in range(batch):
        found = [o[-3 - d] for o in (a, b) if len(o) > d + 2 and axis_size(o[-3 - d]) == hint(shape[batch - 1 - d])]
        lead[batch - 1 - d] = found[0] if found else lead[batch - 1 - d]
    return (*lead, *([rows] if rows is not None else []), *([columns] if columns is not None else []))


def _attention(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    return (*axes[node.args[0]][:-1], axes[node.args[2]][-1])


def _convolution(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    """Each output position stems from the input positions of its own dimension."""
    picture = axes[node.args[0]]
    if len(picture) != len(shape):
        return tuple(new_axis(s) for s in shape)
    return (picture[0], new_axis(shape[1]), *(entangled(s, axis) for s, axis in zip(shape[2:], picture[2:], strict=True)))


def _padded(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    return tuple(axis if axis_size(axis) == hint(s) else entangled(s, axis) for s, axis in zip(shape, _keep(node, axes), strict=True))


def _im2col(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    """F.unfold: (B, C, H, W) to (B, C * patch, patches)."""
    picture = _keep(node, axes)
    return (*picture[:-3], *map(new_axis, shape[len(picture) - 3 : -1]), entangled(shape[-1], *picture[-2:]))


def _unfold(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    """Tensor.unfold: windows along one dimension, their content in a new last one."""
    kept = list(_keep(node, axes))
    dim = node.args[1] % len(kept)
    return (*kept[:dim], entangled(shape[dim], kept[dim]), *kept[dim + 1 :], entangled(shape[-1], kept[dim]))


def _reordered(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    """roll, flip, gather, index_select: along their dimensions the positions are others of the same axis."""
    kept = _keep(node, axes)
    dims = node.args[2 if node.target._opname == "roll" and len(node.args) > 2 else 1]
    changed = {d % len(kept) for d in ([dims] if isinstance(dims, int) else dims)}
    return tuple(entangled(s, kept[d]) if d in changed else kept[d] for d, s in enumerate(shape))


def _expand(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = _keep(node, axes)
    lead = len(shape) - len(kept)
    grown = [kept[d - lead] if d >= lead and axis_size(kept[d - lead]) == hint(s) else new_axis(s) for d, s in enumerate(shape)]
    return tuple(grown)


def _reduction(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = _keep(node, axes)
    dims = _arg(node, 2 if operation(node.target) == "linalg_vector_norm" else 1, "dim")  # a norm's order comes first
    if dims is None or isinstance(dims, bool):
        return tuple(new_axis(s) for s in shape)
    gone = {d % len(kept) for d in ([dims] if isinstance(dims, int) else dims)}
    if len(shape) == len(kept):
        return tuple(new_axis(s) if d in gone else kept[d] for d, s in enumerate(shape))
    return tuple(a for d, a in enumerate(kept) if d not in gone)


def _embedding(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    return (*axes[node.args[1]], new_axis(shape[-1]))


def _index(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    """A gather by index tensors: the indexed dimensions become the indices', the rest stay."""
    kept = list(axes[node.args[0]])
    indices = list(node.args[1])
    used = [d for d, i in enumerate(indices) if i is not None]
    adjacent = used == list(range(used[0], used[-1] + 1)) if used else False
    if not adjacent or not all(isinstance(axes.get(indices[d]), tuple) for d in used):
        return tuple(new_axis(s) for s in shape)
    inner = len(shape) - (len(kept) - len(used))
    broadcast = [reduce(unify, [axes[indices[d]][k - inner] for d in used if len(axes[indices[d]]) >= inner - k]) for k in range(inner)]
    taken_from = sources_of(kept[d] for d in used)
    broadcast = [tuple(replace(p, sources=p.sources | taken_from) for p in axis) for axis in broadcast]
    return (*kept[: used[0]], *broadcast, *kept[used[-1] + 1 :])


def _einsum(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    operands, _arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    letters: dict[str, Axis] = {}
    for term, operand in zip(operands.split(","), node.args[1], strict=True):
        letters = dict(zip(term, axes[operand], strict=False)) | letters
    if "." in operands or len(result) != len(shape):
        return tuple(new_axis(s) for s in shape)
    return tuple(letters.get(letter) or new_axis(s) for letter, s in zip(result, shape, strict=True))


def _outer(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    return (axes[node.args[0]][0], axes[node.args[1]][0])


def _creation(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    return tuple(new_axis(s) for s in shape)


def _first_operand(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], index: int) -> Axes:
    kept = _keep(node, axes)
    return kept if len(kept) == len(shape) else same_positions(node, axes, shape, index)


def _complex(node: fx.Node, axes: Mapping[fx.Node, Value], shape: Sequence[Any], _: int) -> Axes:
    kept = _keep(node, axes)
    return kept[:-1] if len(kept) > len(shape) else (*kept, new_axis(shape[-1]))


RULES: dict[str, Callable[..., Axes]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias"), _reshape),
    **dict.fromkeys(("permute",), _permute),
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    **dict.fromkeys(("unsqueeze",), _unsqueeze),
    **dict.fromkeys(("squeeze",), _squeeze),
    **dict.fromkeys(("select",), _select),
    **dict.fromkeys(("unbind",), _unbind),
    **dict.fromkeys(("slice",), _slice),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _split_sizes),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("stack",), _stack),
    **dict.fromkeys(("linear",), _linear),
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm"), _matmul),
    **dict.fromkeys(("scaled_dot_product_attention",), _attention),
    **dict.fromkeys(
        """conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d pixel_shuffle pixel_unshuffle avg_pool1d
        avg_pool2d avg_pool3d max_pool2d adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d""".split(),  # noqa: SIM905
        _convolution,
    ),
    **dict.fromkeys(("roll", "flip", "gather", "index_select"), _reordered),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(("im2col",), _im2col),
    **dict.fromkeys(("unfold",), _unfold),
    **dict.fromkeys(("expand",), _expand),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "any", "all", "argmax", "var", "std", "linalg_vector_norm"), _reduction),
    **dict.fromkeys(("embedding",), _embedding),
    **dict.fromkeys(("index",), _index),
    "einsum": _einsum,
    "outer": _outer,
    **dict.fromkeys(("zeros", "ones", "full", "arange", "empty", "rand", "randn", "linspace", "eye"), _creation),
    **dict.fromkeys(
        ("slice_scatter", "select_scatter", "copy", "copy_", "index_put", "scatter", "masked_fill", "layer_norm"), _first_operand
    ),
    **dict.fromkeys(
        ("layer_norm", "rms_norm", "native_layer_norm", "group_norm", "type_as", "dropout", "softmax", "_softmax"), _first_operand
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), _first_operand),
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
}
