"""Every attention in a graph: its node, and the module that holds it together with its projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edit_compile.passes.canonicalize import SDPA
from edit_compile.passes.graph_walk import argument, module_path, operand, optional_operand, upstream

aten = torch.ops.aten
LINEARS = (aten.linear.default, aten.addmm.default)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class Attention:
    """One attention. `index` counts the attentions of the same module."""

    node: fx.Node
    path: str
    index: int

    @property
    def query(self) -> fx.Node:
        return operand(self.node, 0)

    @property
    def key(self) -> fx.Node:
        return operand(self.node, 1)

    @property
    def value(self) -> fx.Node:
        return operand(self.node, 2)

    @property
    def mask(self) -> fx.Node | None:
        return optional_operand(self.node, 3, "attn_mask")

    @property
    def causal(self) -> bool:
        return bool(argument(self.node, 5, "is_causal"))

    @property
    def symbolic_scale(self) -> bool:
        """Whether the softmax scale is computed from sizes."""
        return isinstance(self._scale, fx.Node)

    @property
    def scale(self) -> float | None:
        """The softmax scale, or None for the inverse root of a head's channels."""
        return float(self._scale) if isinstance(self._scale, int | float) else None

    @property
    def _scale(self) -> Any:
        return argument(self.node, 6, "scale")


def find_attention(graph: fx.Graph) -> list[Attention]:
    """List the softmax attentions of a canonical graph, in order of execution."""
    seen: dict[str, int] = {}
    found = []
    for node in graph.nodes:
        if node.target is SDPA:
            path = site_path(node)
            found.append(Attention(node, path, seen.get(path, 0)))
            seen[path] = seen.get(path, 0) + 1
    return found


def is_linear(node: fx.Node) -> bool:
    """Say whether a node is a Linear's computation, or a call of a Linear's module."""
    return node.target in LINEARS or (node.op == "call_module" and bool(node.meta.get("linear")))


def is_projection(node: fx.Node) -> bool:
    """Say whether a node maps the channels of each position on its own: a Linear, or a convolution whose kernel has one place."""
    return is_linear(node) or _is_pointwise_convolution(node) or (node.op == "call_module" and bool(node.meta.get("projection")))


def _is_pointwise_convolution(node: fx.Node) -> bool:
    if node.target not in CONVOLUTIONS:
        return False
    kernel, rest = operand(node, 1).meta["val"].shape[2:], [argument(node, at, name) for at, name in ((3, "stride"), (4, "padding"))]
    stride, padding = ([] if isinstance(found, str) or found is None else list(found) for found in rest)
    return all(size == 1 for size in (*kernel, *stride)) and not any(padding) and argument(node, 6, "groups", 1) == 1


def site_path(attention: fx.Node) -> str:
    """Find the innermost module that contains the attention and the Linears its operands come from."""
    paths = [module_path(attention), *(module_path(n) for at in range(3) for n in projections(operand(attention, at)))]
    return common_path(paths)


def projections(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nearest projections that a tensor is computed from, on every way back that has one."""
    found = upstream(node, enter=lambda at: not is_projection(at) and (at is node or at.op == "call_function"))
    return (at for at in found if is_projection(at))


def common_path(paths: list[str]) -> str:
    """Return the longest path that all of some module paths begin with, by whole names."""
    shared = paths[0].split(".") if paths[0] else []
    for path in paths[1:]:
        parts = path.split(".") if path else []
        length = next((i for i, (a, b) in enumerate(zip(shared, parts, strict=False)) if a != b), min(len(shared), len(parts)))
        shared = shared[:length]
    return ".".join(shared)
