"""Every attention in a graph: its node, and the module that holds it together with its projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edit_compile.passes.canonicalize import SDPA

aten = torch.ops.aten
LINEARS = (aten.linear.default, aten.addmm.default)
_MATMULS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Attention:
    """One attention. `index` counts the attentions of the same module; `linear` is one that has no softmax to replace."""

    node: fx.Node
    path: str
    index: int
    linear: bool = False

    @property
    def query(self) -> fx.Node:
        return self.node.args[0]

    @property
    def key(self) -> fx.Node:
        return self.node.args[1]

    @property
    def value(self) -> fx.Node:
        return self.node.args[2]

    @property
    def mask(self) -> fx.Node | None:
        mask = self.node.args[3] if len(self.node.args) > 3 else self.node.kwargs.get("attn_mask")
        return mask if isinstance(mask, fx.Node) else None

    @property
    def causal(self) -> bool:
        return bool(self.node.args[5] if len(self.node.args) > 5 else self.node.kwargs.get("is_causal"))

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
        return self.node.args[6] if len(self.node.args) > 6 else self.node.kwargs.get("scale")


def find_attention(graph: fx.Graph) -> list[Attention]:
    """The softmax attentions of a canonical graph, in order of execution."""
    seen: dict[str, int] = {}
    found = []
    for node in graph.nodes:
        if node.target is SDPA:
            path = site_path(node)
            found.append(Attention(node, path, seen.get(path, 0)))
            seen[path] = seen.get(path, 0) + 1
    return found


def module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([path for path, _ in stack.values()]), "")


def site_path(attention: fx.Node) -> str:
    """The innermost module that contains the attention and the Linears its operands come from."""
    paths = [module_path(attention), *(module_path(n) for operand in attention.args[:3] for n in projections(operand))]
    return _common([path.split(".") if path else [] for path in paths])


def projections(node: fx.Node) -> Iterator[fx.Node]:
    """The nearest Linears that a tensor is computed from, on every way back that has one."""
    seen, pending = {node}, [node]
    while pending:
        at = pending.pop()
        if at.target in LINEARS:
            yield at
            continue
        for operand in at.all_input_nodes:
            if operand not in seen and operand.op == "call_function":
                seen.add(operand)
                pending.append(operand)


def _common(paths: list[list[str]]) -> str:
    # A Linear's own path ends in its name: its holder is what is common with the attention.
    shared = paths[0]
    for path in paths[1:]:
        length = next((i for i, (a, b) in enumerate(zip(shared, path, strict=False)) if a != b), min(len(shared), len(path)))
        shared = shared[:length]
    return ".".join(shared)


def contractions(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every matrix product as (node, right operand): linear attention sums its keys and values over tokens in one."""
    for node in graph.nodes:
        if node.target in _MATMULS and len(node.all_input_nodes) == 2:
            yield node, node.args[1]
