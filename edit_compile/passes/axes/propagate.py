"""Axes followed forward through a graph, from its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from torch import Tensor, fx

from edit_compile.passes.axes.algebra import Axes, Value, axis_size, hint, new_axis
from edit_compile.passes.axes.rules import RULES, operation, same_positions
from edit_compile.passes.graph_walk import shape_of


def flow_axes(graph: fx.Graph, seed: Callable[[fx.Node], Axes | None]) -> dict[fx.Node, Value]:
    """The axes of every tensor in the graph. `seed` gives a placeholder's; None stands for a constant's."""
    axes: dict[fx.Node, Value] = {}
    for node in graph.nodes:
        shape = shape_of(node)
        if node.op in ("placeholder", "get_attr"):
            if shape is not None:
                axes[node] = seed(node) or tuple(new_axis(s) for s in shape)
        elif node.op in ("call_function", "call_module"):
            axes[node] = _through(node, axes)
    return axes


def _through(node: fx.Node, axes: Mapping[fx.Node, Value]) -> Value:
    value = node.meta.get("val")
    if node.target is operator.getitem:
        source = axes.get(node.args[0])
        return source[node.args[1]] if isinstance(source, list) else None
    outputs = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, list | tuple) else []
    if not outputs or not all(isinstance(v, Tensor) for v in outputs):
        return None
    shapes = [tuple(v.shape) for v in outputs]
    rule = RULES.get(operation(node.target), same_positions)
    results = []
    for index, shape in enumerate(shapes):
        found = rule(node, axes, shape, index)
        results.append(tuple(axis if axis_size(axis) == hint(s) else new_axis(s) for axis, s in zip(found, shape, strict=True)))
    return results[0] if isinstance(value, Tensor) else results
