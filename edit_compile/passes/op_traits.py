"""Whether an operation treats tokens one by one: only then may it run on fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from edit_compile.passes.axes.algebra import Axis, Value
from edit_compile.passes.graph_walk import argument, numbers, op_name

VIEW_OPS = frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze select unbind getitem chunk split
    split_with_sizes contiguous clone slice movedim moveaxis swapaxes swapdims mT alias detach""".split()  # noqa: SIM905
)
_STRUCTURAL = VIEW_OPS | frozenset(
    """cat stack expand repeat repeat_interleave to _to_copy type_as copy slice_scatter dropout sym_size view_as_complex
    view_as_real zeros_like ones_like empty_like""".split()  # noqa: SIM905
)
_ALONG_LAST = frozenset(["linear", "layer_norm", "rms_norm", "native_layer_norm"])
_ALONG_DIM = frozenset(["softmax", "_softmax", "mean", "sum", "amax", "amin", "var", "linalg_vector_norm"])


def is_pointwise(node: fx.Node) -> bool:
    """Say whether torch declares an operation pointwise: every number of the result follows from those at its place."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def first_token_mixing_node(nodes: list[fx.Node], axes: Mapping[fx.Node, Value], is_image: Callable[[Axis], bool]) -> fx.Node | None:
    """Return the first of the nodes that mixes image tokens, or whose effect on them is unknown."""
    return next((node for node in nodes if node.op == "call_function" and _mixes(node, axes, is_image)), None)


def _mixes(node: fx.Node, axes: Mapping[fx.Node, Value], is_image: Callable[[Axis], bool]) -> bool:
    name = op_name(node)
    tensors = [found for each in node.all_input_nodes if isinstance(found := axes.get(each), tuple)]
    if not any(is_image(axis) for tensor in tensors for axis in tensor):
        return False
    if name in _STRUCTURAL or is_pointwise(node):
        return False
    first = tensors[0]
    if name in _ALONG_LAST:
        normalized = argument(node, 1, "normalized_shape")
        return any(is_image(axis) for axis in first[-len(normalized) if isinstance(normalized, list | tuple) else -1 :])
    at = 2 if name == "linalg_vector_norm" else 1  # a norm's order comes first
    if name in _ALONG_DIM and isinstance(argument(node, at, "dim"), int | list | tuple):
        return any(is_image(first[dim]) for dim in numbers(node, at, "dim"))
    if name in ("matmul", "bmm") and len(tensors) == 2:
        return is_image(first[-1]) or any(is_image(axis) for axis in tensors[1])
    return True
