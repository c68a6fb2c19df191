"""op_traits: what runs on tokens one by one may run on fewer of them; whatever else is named."""

from __future__ import annotations

import pytest
import torch

from edit_compile.passes.axes.algebra import new_axis
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.graph_walk import shape_of
from edit_compile.passes.op_traits import first_token_mixing_node
from hand_built import Built, aten

B, N, C = 2, 12, 8

ONE_BY_ONE = {
    "linear": lambda g, x: g.linear(x, "l", 5),
    "layer norm": lambda g, x: g(aten.layer_norm.default, x, [C]),
    "gelu": lambda g, x: g(aten.gelu.default, x),
    "heads": lambda g, x: g(aten.transpose.int, g(aten.view.default, x, [B, N, 2, 4]), 1, 2),
    "channel softmax": lambda g, x: g(aten.softmax.int, x, -1),
    "channel mean": lambda g, x: g(aten.mean.dim, x, [-1], True),
    "rotate": lambda g, x: g(aten.cat.default, [g(aten.neg.default, g(aten.slice.Tensor, x, 2, 4, 8)), x], -1),
    "product with weights": lambda g, x: g(aten.matmul.default, x, g.input("w", C, 5)),
    "another tensor's own": lambda g, x: g(aten.roll.default, g.input("other", 3, C), [1], [0]),
}
MIXING = {
    "token softmax": lambda g, x: g(aten.softmax.int, x, 1),
    "token mean": lambda g, x: g(aten.mean.dim, x, [1], True),
    "mean of all": lambda g, x: g(aten.mean.default, x),
    "norm over tokens too": lambda g, x: g(aten.layer_norm.default, x, [N, C]),
    "group norm": lambda g, x: g(aten.group_norm.default, g(aten.transpose.int, x, 1, 2), 2),
    "conv over tokens": lambda g, x: g(aten.conv1d.default, g(aten.transpose.int, x, 1, 2), g.input("w", C, C, 3)),
    "roll": lambda g, x: g(aten.roll.default, x, [1], [1]),
    "cumulative sum": lambda g, x: g(aten.cumsum.default, x, 1),
    "product over tokens": lambda g, x: g(aten.matmul.default, g.input("w", 4, N), x),
    "tokens by tokens": lambda g, x: g(aten.matmul.default, x, g(aten.transpose.int, x, 1, 2)),
    "reordered": lambda g, x: g(aten.index.Tensor, x, [None, g.input("order", N, dtype=torch.int64)]),
}


def found(make):
    built = Built()
    built.input("x", B, N, C)
    (x,) = built.graph.nodes
    graph = built.output(make(built, x))

    def seed(node):
        return tuple(new_axis(s, "image") if d == 1 else new_axis(s) for d, s in enumerate(shape_of(node))) if node is x else None

    axes = flow_axes(graph, seed)
    return first_token_mixing_node(list(graph.nodes), axes, lambda axis: any("image" in p.all_sources for p in axis))


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_one_by_one(case):
    assert found(ONE_BY_ONE[case]) is None


@pytest.mark.parametrize("case", MIXING)
def test_mixing(case):
    assert found(MIXING[case]) is not None
