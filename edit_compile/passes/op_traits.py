"""Whether an operation treats tokens one by one: only then may it run on fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from edit_compile.passes.axes.algebra import Axes, Axis, AxisSegment, Value, axis_size, is_in_order
from edit_compile.passes.axes.rules import MOVING, Call, apply_rule, operator_name, rule_of, same_positions
from edit_compile.passes.graph_walk import op_name

VIEW_OPS = frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze select unbind getitem chunk split
    split_with_sizes contiguous clone slice movedim moveaxis swapaxes swapdims mT mH adjoint matrix_H numpy_T narrow tensor_split
    unsafe_chunk unsafe_split unsafe_split_with_sizes hsplit vsplit dsplit view_as reshape_as ravel alias detach""".split()  # noqa: SIM905
)
_MARK = "tokens of "  # begins the name that every axis of image tokens gets here
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
    found = apply_rule(rule, Call(node, {**axes, **marked}, _first_shape(node)))
    if found is None:
        return True
    in_order = [each for axis in found if is_in_order(axis) and (each := set(_marks((axis,))))]
    paired = len(in_order) > max(map(len, marks))  # every token of one operand with every token of another
    return paired or set().union(*in_order) != set().union(*marks)


def _first_shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    first = value if isinstance(value, Tensor) else next(each for each in value or () if isinstance(each, Tensor))
    return tuple(first.shape)


def _marked(axes: Axes, operand: int, is_image: IsImage) -> Axes:
    """Return axes in which every one of image tokens is a single segment with a name of its own, and no other has a name."""
    return tuple(
        (AxisSegment(axis_size(axis), "", frozenset({f"{_MARK}operand {operand}, dimension {d}"} if is_image(axis) else ())),)
        if axis_size(axis) > 1
        else (AxisSegment(axis_size(axis), ""),)
        for d, axis in enumerate(axes)
    )


def _marks(axes: Axes) -> list[str]:
    return [source for axis in axes for segment in axis for source in segment.all_sources if source.startswith(_MARK)]
