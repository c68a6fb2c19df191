"""Axes followed forward through a graph, from its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from torch import Tensor, fx

from edit_compile.passes.axes.algebra import Axes, Value, axis_size, entangled, new_axis, sources_of, unify, without_rule
from edit_compile.passes.axes.call import Call, same_positions
from edit_compile.passes.axes.moves import run_written
from edit_compile.passes.axes.rules import apply_rule, operator_name, rule_of
from edit_compile.passes.graph_walk import number, op_name, operand, shape_of
from edit_compile.torch_internals import writes_into_operand

_VIEWS = ("slice", "narrow", "select", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "alias", "detach", "expand")


def flow_axes(graph: fx.Graph, seed: Callable[[fx.Node], Axes | None]) -> dict[fx.Node, Value]:
    """Return the axes of every tensor in a graph. `seed` gives a placeholder's; None stands for a constant's."""
    axes: dict[fx.Node, Value] = {}
    for node in graph.nodes:
        shape = shape_of(node)
        if node.op in ("placeholder", "get_attr"):
            if shape is not None:
                axes[node] = seed(node) or tuple(new_axis(size) for size in shape)
        elif node.op in ("call_function", "call_module"):
            axes[node] = _through(node, axes)
            if writes_into_operand(node.target):
                _write_back(node, axes)
    return axes


def _through(node: fx.Node, axes: Mapping[fx.Node, Value]) -> Value:
    """Return the axes of what an operation gives."""
    if node.target is operator.getitem:
        source = axes.get(operand(node, 0))
        return source[number(node, 1)] if isinstance(source, list) else None
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return _of_output(node, axes, value, 0)
    if not isinstance(value, list | tuple):
        return None
    return [_of_output(node, axes, each, index) if isinstance(each, Tensor) else () for index, each in enumerate(value)]


def _of_output(node: fx.Node, axes: Mapping[fx.Node, Value], output: Tensor, index: int) -> Axes:
    """Return one output's axes: by the operator's rule, or as of one whose doing is unknown if it has none or the rule does not fit."""
    call = Call(node, axes, tuple(output.shape), index)
    rule = same_positions if node.op == "call_module" else rule_of(node.target)
    found = apply_rule(rule, call) if rule is not None else None
    return found if found is not None else without_rule(call.shape, operator_name(node.target), _operands(call))


def _operands(call: Call) -> list[Axes]:
    """Return the axes of all operands, those of lists too."""
    values = [call.axes.get(each) for each in call.node.all_input_nodes]
    return [axes for value in values for axes in (value if isinstance(value, list) else [value]) if isinstance(axes, tuple)]


# ------------------------------------------------------------------ writing through views


def _write_back(node: fx.Node, axes: dict[fx.Node, Value]) -> None:
    """Follow what was written into a view back to the tensor that it is a view of: `y[:, :n] = x` makes x part of y."""
    view, written = operand(node, 0), axes.get(node)
    axes[view] = written
    while isinstance(written, tuple) and view.op == "call_function" and op_name(view) in _VIEWS:
        base = operand(view, 0)
        before = axes.get(base)
        if not isinstance(before, tuple):
            return
        axes[base] = written = _with_part(view, before, written, axes)
        view = base


def _with_part(view: fx.Node, base: Axes, written: Axes, axes: Mapping[fx.Node, Value]) -> Axes:
    """Return the axes of a tensor into a view of which was written."""
    call = Call(view, axes, tuple(shape_of(view) or ()))
    if op_name(view) == "slice" and call.argument("step", 1) != 1:
        return _every_nth_written(base, written, call.dim())
    if op_name(view) in ("slice", "narrow"):
        dim = call.dim()
        length = axis_size(base[dim])
        start = call.position("start", 0, length)
        return run_written(base, written, dim, start, start + axis_size(written[dim]))
    if op_name(view) == "select":
        rest = list(written)
        rest.insert(call.dim(), base[call.dim()])
        return tuple(unify(a, b) if axis_size(a) == axis_size(b) else a for a, b in zip(base, rest, strict=True))
    if sources_of(written) <= sources_of(base):
        return base
    return without_rule(map(axis_size, base), f"a write through {operator_name(view.target)}", [base, written])


def _every_nth_written(base: Axes, written: Axes, dim: int) -> Axes:
    """Return the axes of a tensor of which every n-th position along a dimension was overwritten: `y[..., 0::2] = x`."""
    along = base[dim] if not sources_of([written[dim]]) else entangled(axis_size(base[dim]), base[dim], written[dim])
    pairs = enumerate(zip(base, written, strict=True))
    return tuple(along if d == dim else unify(a, b) if axis_size(a) == axis_size(b) else a for d, (a, b) in pairs)
