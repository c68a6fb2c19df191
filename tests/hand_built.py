"""Graphs written node by node: aten calls whose `val`s are computed on the meta device, with a module path each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from edit_compile.passes.capture import Capture, Source

aten = torch.ops.aten


class Built:
    """A graph under construction. `inputs`, `parameters` make placeholders; calling it adds an operation."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.graph, self.sources, self.dtype = fx.Graph(), {}, dtype

    def input(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> fx.Node:
        return self._placeholder(Source("input", name), shape, dtype)

    def parameter(self, name: str, *shape: int) -> fx.Node:
        return self._placeholder(Source("parameter", name), shape, None)

    def _placeholder(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype | None) -> fx.Node:
        node = self.graph.placeholder(source.name.replace(".", "_"))
        node.meta["val"] = torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        self.sources[str(node.target)] = source
        return node

    def __call__(self, target: Any, *args: Any, at: str = "", **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        if at:
            path = at.split(".")
            node.meta["nn_module_stack"] = {f"L{d}": (".".join(path[:d]), torch.nn.Module) for d in range(len(path) + 1)}
        return node

    def linear(self, x: fx.Node, name: str, out: int, **where: Any) -> fx.Node:
        """`name` is the Linear's path; its module's stack is made from it."""
        weight = self.before_calls(f"{name}.weight", out, x.meta["val"].shape[-1])
        return self(aten.linear.default, x, weight, at=name, **where)

    def before_calls(self, name: str, *shape: int) -> fx.Node:
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        with self.graph.inserting_after(placeholders[-1]):
            return self.parameter(name, *shape)

    def output(self, *nodes: fx.Node) -> fx.Graph:
        self.graph.output(nodes)
        self.graph.lint()
        return self.graph

    def capture(self) -> Capture:
        return captured(self.graph, self.sources)


def captured(graph: fx.Graph, sources: dict[str, Source]) -> Capture:
    return Capture(SimpleNamespace(graph_module=SimpleNamespace(graph=graph), constants={}), sources)


def run(graph: fx.Graph, *inputs: Tensor) -> tuple[Tensor, ...]:
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*inputs)


def targets(graph: fx.Graph) -> list[str]:
    return [n.target._opname for n in graph.nodes if n.op == "call_function" and hasattr(n.target, "_opname")]


def heads(built: Built, x: fx.Node, count: int, at: str = "") -> fx.Node:
    """(B, N, C) to (B, H, N, D)."""
    b, n, c = x.meta["val"].shape
    return built(aten.transpose.int, built(aten.view.default, x, [b, n, count, c // count], at=at), 1, 2, at=at)


def attend(built: Built, tokens: fx.Node, at: str, *, keys: fx.Node | None = None, count: int = 2, mask: fx.Node | None = None) -> fx.Node:
    """A whole site: projections, heads, softmax attention, heads joined."""
    keys = tokens if keys is None else keys
    channels = tokens.meta["val"].shape[-1]
    q, k, v = (heads(built, built.linear(x, f"{at}.{n}", channels), count, at) for n, x in zip("qkv", (tokens, keys, keys), strict=True))
    y = built(aten.scaled_dot_product_attention.default, q, k, v, *([mask] if mask is not None else []), at=at)
    return built(aten.flatten.using_ints, built(aten.transpose.int, y, 1, 2, at=at), 2, at=at)
