"""Rules of the operators that sum, or otherwise mix, positions: products, reductions, norms, neighbourhoods, matrix functions."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

from edit_compile.passes.axes.algebra import Axes, Axis, axis_size, entangled, hint, new_axis, unify
from edit_compile.passes.axes.call import Call, aligned, size_of
from edit_compile.passes.einsum import dimension_names
from edit_compile.passes.graph_walk import op_name

# ------------------------------------------------------------------ products


def linear(call: Call) -> Axes:
    return (*call.of(0)[:-1], new_axis(call.shape[-1]))


def matrix_product(call: Call) -> Axes:
    """Multiply (..., rows, summed) by (..., summed, columns); vectors have neither rows nor columns. A bias comes before both."""
    count = len(call.node.args)
    left, right = call.of(count - 2), call.of(count - 1)
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    batch = call.shape[: len(call.shape) - len(rows) - len(columns)]
    return (*aligned(batch, [axes[:-2] for axes in (left, right) if len(axes) > 2]), *rows, *columns)


def summed_product(call: Call) -> Axes:
    """Sum the products of matrices over the batch too: addbmm."""
    return (call.of(1)[-2], call.of(2)[-1])


def chain(call: Call) -> Axes:
    """Multiply matrices one after the other, the first and the last may be vectors."""
    matrices = call.listed(0)
    return (*matrices[0][:-1], *(matrices[-1][-1:] if len(matrices[-1]) > 1 else ()))


def inner_product(call: Call) -> Axes:
    """Sum over the last dimension of both."""
    return (*call.of(0)[:-1], *call.of(1)[:-1])


def outer_product(call: Call) -> Axes:
    count = len(call.node.args)
    return (call.of(count - 2)[0], call.of(count - 1)[0])


def contracted(call: Call) -> Axes:
    """Sum over the dimensions named of both: tensordot."""
    kept = []
    for axes, name in ((call.of(0), "dims_self"), (call.of(1), "dims_other")):
        gone = {dim % len(axes) for dim in call.argument(name)}
        kept += [axis for d, axis in enumerate(axes) if d not in gone]
    return tuple(kept)


def bilinear(call: Call) -> Axes:
    return (*map(unify, call.of(0)[:-1], call.of(1)[:-1]), new_axis(call.shape[-1]))


def distances(call: Call) -> Axes:
    """Compare every row of one with every row of the other: cdist."""
    left, right = call.of(0), call.of(1)
    return (*aligned(call.shape[:-2], [left[:-2], right[:-2]]), left[-2], right[-2])


def attention(call: Call) -> Axes:
    """Give every query a sum of values; what else the kernels return has no positions that matter."""
    if call.output:
        return tuple(new_axis(size) for size in call.shape)
    return (*aligned(call.shape[:-2], [call.of(0)[:-2], call.of(1)[:-2]]), call.of(0)[-2], call.of(2)[-1])


def einsum(call: Call) -> Axes:
    """Give what one letter names one axis."""
    operands = call.listed(1)
    terms, result = dimension_names(str(call.node.args[0]), list(map(len, operands)))
    named: dict[str, Axis] = {}
    for term, axes in zip(terms, operands, strict=True):
        for name, axis in zip(term, axes, strict=True):
            known = named.get(name)
            named[name] = axis if known is None or axis_size(known) == 1 else known if axis_size(axis) == 1 else unify(known, axis)
    return tuple(named[name] for name in result)


# ------------------------------------------------------------------ reductions


_WHOLE_BY_DEFAULT: dict[str, Any] = {"linalg_matrix_norm": (-2, -1), "nuclear_norm": (), "linalg_vecdot": -1}


def reduced(call: Call) -> Axes:
    """Make one number of all positions along dimensions, along all of them where none is named."""
    name = "dim" if call.argument("dim") is not None else "axis"
    dims = call.argument(name, _WHOLE_BY_DEFAULT.get(op_name(call.node), ()))
    dims = () if isinstance(dims, bool) else dims
    gone = call.dims(name, dims) if dims not in ((), []) else set(range(len(call.first)))
    if len(call.shape) == len(call.first):
        return tuple(new_axis(s) if dim in gone else axis for dim, (s, axis) in enumerate(zip(call.shape, call.first, strict=True)))
    return tuple(axis for dim, axis in enumerate(call.first) if dim not in gone)


def reduced_pairs(call: Call) -> Axes:
    """Compare two tensors along one dimension: cosine_similarity, linalg_vecdot, pairwise_distance."""
    tensors = call.tensors
    rank = max(map(len, tensors))
    defaults = {"cosine_similarity": 1, "linalg_vecdot": -1, "pairwise_distance": -1}
    gone = int(call.argument("dim", defaults[op_name(call.node)])) % rank
    result: list[Axis] = []
    for d in range(rank):
        found = [t[d - rank + len(t)] for t in tensors if d - rank + len(t) >= 0]
        wide = [axis for axis in found if axis_size(axis) == max(map(axis_size, found))]
        result.append(reduce(unify, wide))
    if len(call.shape) == rank:  # keepdim
        return tuple(new_axis(1) if d == gone else axis for d, axis in enumerate(result))
    return tuple(axis for d, axis in enumerate(result) if d != gone)


def loss(call: Call) -> Axes:
    """Compare two tensors place by place, and by default sum up everything."""
    return aligned(call.shape, call.tensors)


# ------------------------------------------------------------------ along dimensions, which keep their meaning


def mixed(axis: Axis) -> Axis:
    """Return an axis whose positions stand for what they did, while each depends on many."""
    return tuple(replace(segment, in_order=False) for segment in axis)


def mixed_along(call: Call, dims: set[int]) -> Axes:
    """Mix the positions of dimensions that keep their meaning where they keep their size."""
    result = []
    for d, (size, axis) in enumerate(zip(call.shape, call.first, strict=True)):
        result.append(axis if d not in dims else mixed(axis) if axis_size(axis) == hint(size) else entangled(size, axis))
    return tuple(result)


def along_dim(call: Call) -> Axes:
    """Compute along one or several dimensions: softmax, cumsum, fft, glu."""
    fixed = {"fft_fft2": (-2, -1), "fft_ifft2": (-2, -1), "fft_rfft2": (-2, -1), "fft_irfft2": (-2, -1), "fft_hfft2": (-2, -1)}
    default: tuple[int, ...] | int = fixed.get(op_name(call.node), -1)
    if op_name(call.node) in ("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_hfftn", "fft_ihfftn"):
        default = tuple(range(len(call.first)))
    return mixed_along(call, call.dims(default=default))


def along_all_but(call: Call) -> Axes:
    """Compute along all dimensions but one: renorm."""
    return mixed_along(call, set(range(len(call.first))) - call.dims())


def over_last(call: Call) -> Axes:
    """Normalize over the last dimensions: layer_norm, rms_norm. What else it returns are statistics."""
    count = len(call.argument("normalized_shape", (1,)))
    rank = len(call.first)
    if call.output:
        return tuple(axis if axis_size(axis) == hint(size) else new_axis(size) for axis, size in zip(call.first, call.shape, strict=True))
    return mixed_along(call, set(range(rank - count, rank)))


def over_all_but_batch(call: Call) -> Axes:
    """Normalize over groups of channels and all positions: group_norm, instance_norm. What else it returns are statistics."""
    if call.output:
        return (call.first[0], *(new_axis(size) for size in call.shape[1:]))
    return mixed_along(call, set(range(1, len(call.first))))


def batch_norm(call: Call) -> Axes:
    """Normalize every channel by what is stored, in training by the mean over all other dimensions."""
    if call.output:
        return tuple(new_axis(size) for size in call.shape)
    training = call.argument("training", "legit" in op_name(call.node) and "no_training" not in op_name(call.node))
    return mixed_along(call, {d for d in range(len(call.first)) if d != 1}) if training else call.first


# ------------------------------------------------------------------ neighbourhoods


def convolved(call: Call) -> Axes:
    """Derive each output position from the input positions of its own dimension: (B, C, ...) to (B, C', ...), or without B."""
    image, weight = call.of(0), call.value(1)
    spatial = weight.ndim - 2 if weight is not None else len(image) - 2
    lead = len(image) - spatial
    pointwise = weight is not None and all(int(size) == 1 for size in weight.shape[2:]) and _unmoved(call)
    rest = zip(call.shape[lead:], image[lead:], strict=True)
    return (*image[: lead - 1], new_axis(call.shape[lead - 1]), *(axis if pointwise else local(size, axis) for size, axis in rest))


def _unmoved(call: Call) -> bool:
    """Say whether a convolution of one tap leaves every position where it is."""
    still = {"stride": 1, "padding": 0, "output_padding": 0}
    given = {name: call.argument(name) for name in still}
    return all(size_of(each) == still[name] for name, amounts in given.items() if not isinstance(amounts, str) for each in _listed(amounts))


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def local(size: Any, axis: Axis) -> Axis:
    """Return the axis of a dimension after a filter along it, resampled where its size changes."""
    return mixed(axis) if axis_size(axis) == hint(size) else entangled(size, axis)


def resampled(call: Call) -> Axes:
    """Filter or resample along the last one, two or three dimensions, as the operator's name says: pooling, upsampling, pixel_shuffle."""
    name = op_name(call.node)
    dims = 3 if "3d" in name else 1 if "1d" in name else 2
    lead, channels = len(call.first) - dims, name in ("pixel_shuffle", "pixel_unshuffle")
    front = [*call.first[: lead - 1], new_axis(call.shape[lead - 1])] if channels else call.first[:lead]
    return (*front, *(local(size, axis) for size, axis in zip(call.shape[lead:], call.first[lead:], strict=True)))


def patches(call: Call) -> Axes:
    """Cut into patches, as F.unfold does: (B, C, H, W) to (B, C * patch, patches)."""
    image = call.first
    return (*image[:-3], new_axis(call.shape[-2]), entangled(call.shape[-1], *image[-2:]))


def patches_joined(call: Call) -> Axes:
    """Lay patches out, as F.fold does: (B, C * patch, patches) to (B, C, H, W)."""
    merged = call.first[-1]
    dims = merged[0].composed_of if len(merged) == 1 and len(merged[0].composed_of) == 2 else (merged, merged)
    return (*call.first[:-2], new_axis(call.shape[-3]), *(entangled(size, axis) for size, axis in zip(call.shape[-2:], dims, strict=True)))


def sampled(call: Call) -> Axes:
    """Sample an image (B, C, ...) at the places of a grid (B, ..., 2 or 3): grid_sampler."""
    image, grid = call.of(0), call.of(1)
    places = zip(call.shape[2:], grid[1:-1], strict=True)
    return (image[0], image[1], *(entangled(size, axis, *image[2:]) for size, axis in places))


# ------------------------------------------------------------------ matrix functions


def matrix_function(call: Call) -> Axes:
    """Compute with whole matrices, the last two dimensions: inverses, decompositions, determinants."""
    batch, matrix = call.first[:-2], call.first[-2:]
    return (*batch, *(entangled(size, *matrix) for size in call.shape[len(batch) :]))


def solved(call: Call) -> Axes:
    """Solve A X = B: the columns of the solution are those of B."""
    left, right = call.of(0), call.of(1)
    if len(right) < 2 or len(call.shape) != len(right):
        return tuple(entangled(size, *left, *right) for size in call.shape)
    return (*aligned(call.shape[:-2], [left[:-2], right[:-2]]), entangled(call.shape[-2], *left[-2:], right[-2]), right[-1])
