"""Whether an operation treats tokens one by one: only then may it run on fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from edit_compile.passes.axes.algebra import Axis, Value

aten = torch.ops.aten
VIEW_OPS = frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze select unbind getitem chunk split
    split_with_sizes contiguous clone slice movedim alias detach""".split()  # noqa: SIM905
)
_STRUCTURAL = VIEW_OPS | frozenset(
    """cat stack expand repeat repeat_interleave to _to_copy type_as copy slice_scatter dropout sym_size view_as_complex
    view_as_real zeros_like ones_like empty_like""".split()  # noqa: SIM905
)
_ALONG_LAST = frozenset(["linear", "layer_norm", "rms_norm", "native_layer_norm"])
_ALONG_DIM = frozenset(["softmax", "_softmax", "mean", "sum", "amax", "amin", "var", "linalg_vector_norm"])


def op_name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def first_token_mixing_node(nodes: list[fx.Node], axes: Mapping[fx.Node, Value], is_image: Callable[[Axis], bool]) -> fx.Node | None:
    """The first of the nodes that mixes image tokens, or whose effect on them is unknown."""
    return next((n for n in nodes if n.op == "call_function" and _mixes(n, axes, is_image)), None)


def _mixes(node: fx.Node, axes: Mapping[fx.Node, Value], is_image: Callable[[Axis], bool]) -> bool:
    name = op_name(node)
    operands = [axes[n] for n in node.all_input_nodes if isinstance(axes.get(n), tuple)]
    if not any(is_image(axis) for operand in operands for axis in operand):
        return False
    if name in _STRUCTURAL or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return False
    first = operands[0]
    if name in _ALONG_LAST:
        normalized = node.args[1] if isinstance(node.args[1], list | tuple) else [1]
        return any(is_image(axis) for axis in first[-len(normalized) :])
    at = 2 if name == "linalg_vector_norm" else 1  # a norm's order comes first
    if name in _ALONG_DIM and len(node.args) > at:
        dims = node.args[at] if isinstance(node.args[at], list | tuple) else [node.args[at]]
        return any(is_image(first[d]) for d in dims if isinstance(d, int))
    if name in ("matmul", "bmm") and len(operands) == 2:
        return is_image(first[-1]) or any(is_image(axis) for axis in operands[1])
    return True
