"""Whether an operation treats tokens one by one: only then may it run on fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from edit_compile.passes.axes.algebra import Axes, Axis, AxisSegment, Value, axis_size, is_in_order
from edit_compile.passes.axes.rules import MOVING, Call, operator_name, rule_of, same_positions
from edit_compile.passes.graph_walk import op_name, shape_of

VIEW_OPS = frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze select unbind getitem chunk split
    split_with_sizes contiguous clone slice movedim moveaxis swapaxes swapdims mT mH adjoint matrix_H numpy_T narrow tensor_split
    unsafe_chunk unsafe_split unsafe_split_with_sizes hsplit vsplit dsplit view_as reshape_as ravel alias detach""".split()  # noqa: SIM905
)
_SIZES_AND_PLACES = frozenset(["getitem", "sym_size"])

IsImage = Callable[[Axis], bool]


def is_pointwise(node: fx.Node) -> bool:
    """Say whether torch declares an operation pointwise: every number of the result follows from those at its place."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def first_token_mixing_node(nodes: list[fx.Node], axes: Mapping[fx.Node, Value], is_image: IsImage) -> fx.Node | None:
    """Return the first of the nodes that mixes image tokens, or whose effect on them is unknown."""
    return next((node for node in nodes if node.op == "call_function" and _mixes(node, axes, is_image)), None)


def effect_on_tokens(node: fx.Node) -> str:
    """Say what a node that `first_token_mixing_node` has found does."""
    if rule_of(node.target) is None:
        return f"{operator_name(node.target)} ({node.name}) has no rule: what it does to image tokens is unknown"
    return f"{node.target} ({node.name}) mixes image tokens"


def _mixes(node: fx.Node, axes: Mapping[fx.Node, Value], is_image: IsImage) -> bool:
    marked = {
        each: _marked(found, i, is_image) for i, each in enumerate(node.all_input_nodes) if isinstance(found := axes.get(each), tuple)
    }
    marks = [set(_marks(found)) for found in marked.values()]
    if not any(marks) or op_name(node) in MOVING | _SIZES_AND_PLACES:
        return False
    rule = rule_of(node.target)
    if rule is None or rule is same_positions:
        return rule is None
    value = node.meta.get("val")
    shape = shape_of(node) or next((tuple(each.shape) for each in value or () if isinstance(each, Tensor)), ())
    try:
        found = rule(Call(node, {**axes, **marked}, shape))
    except (TypeError, ValueError, IndexError, KeyError, AttributeError):  # arguments in a form that the rule does not foresee
        return True
    held = [set(_marks((axis,))) for axis in found if is_in_order(axis)]
    with_tokens = [each for each in held if each]
    return set().union(*with_tokens) != set().union(*marks) or len(with_tokens) > max(map(len, marks))


def _marked(axes: Axes, operand: int, is_image: IsImage) -> Axes:
    """Return axes in which every one of image tokens is a single segment with a name of its own."""
    names = (f"operand {operand} dimension {d}" for d in range(len(axes)))
    return tuple(
        (AxisSegment(axis_size(axis), "", frozenset({_MARK + name})),) if is_image(axis) and axis_size(axis) > 1 else _unnamed(axis)
        for axis, name in zip(axes, names, strict=True)
    )


_MARK = "tokens of "


def _unnamed(axis: Axis) -> Axis:
    return (AxisSegment(axis_size(axis), ""),)


def _marks(axes: Axes) -> list[str]:
    return [source for axis in axes for segment in axis for source in segment.all_sources if source.startswith(_MARK)]
