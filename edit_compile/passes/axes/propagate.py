"""Axes followed forward through a graph, from its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from torch import Tensor, fx

from edit_compile.passes.axes.algebra import Axes, Value, axis_size, hint, new_axis
from edit_compile.passes.axes.rules import RULES, Call, same_positions
from edit_compile.passes.graph_walk import number, op_name, operand, shape_of


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
    return axes


def _through(node: fx.Node, axes: Mapping[fx.Node, Value]) -> Value:
    """Return the axes of what an operation gives; a rule's axis whose size is not the output's is not trusted."""
    if node.target is operator.getitem:
        source = axes.get(operand(node, 0))
        return source[number(node, 1)] if isinstance(source, list) else None
    value = node.meta.get("val")
    outputs = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, list | tuple) else []
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        return None
    rule = RULES.get(op_name(node), same_positions) if node.op == "call_function" else same_positions
    results = []
    for index, output in enumerate(outputs):
        shape = tuple(output.shape)
        found = rule(Call(node, axes, shape, index))
        results.append(tuple(axis if axis_size(axis) == hint(size) else new_axis(size) for axis, size in zip(found, shape, strict=True)))
    return results[0] if isinstance(value, Tensor) else results
