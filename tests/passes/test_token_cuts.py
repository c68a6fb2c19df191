"""token_cuts: whatever takes a run of tokens becomes a slice of the same values; other cuts stay as they are."""

from __future__ import annotations

import operator

import pytest
import torch

from edit_compile.passes.token_cuts import canonicalize_cuts
from hand_built import Built, aten, run, targets

N, C = 11, 4


def piece(target, *args, at=1):
    return lambda g, x: g(operator.getitem, g(target, x, *args), at)


def by_range(target, wrap, *bounds, shift=0):
    def make(g, x):
        index = g(aten.arange.start if len(bounds) > 1 else aten.arange.default, *bounds, device="meta")
        index = g(aten.add.Tensor, index, shift) if shift else index
        return g(target, x, *wrap(index))

    return make


def of_dim(index):
    return 1, index


def listed(index):
    return ([None, index],)


CUTS = {
    "narrow": lambda g, x: g(aten.narrow.default, x, 1, 3, 5),
    "narrow from the end": lambda g, x: g(aten.narrow.default, x, 1, -4, 2),
    "split_with_sizes": piece(aten.split_with_sizes.default, [3, 6, 2], 1),
    "split": piece(aten.split.Tensor, 4, 1),
    "the last of a split": piece(aten.split.Tensor, 4, 1, at=2),
    "chunk": piece(aten.chunk.default, 3, 1),
    "tensor_split": piece(aten.tensor_split.indices, [2, -3], 1),
    "index_select": by_range(aten.index_select.default, of_dim, 3, 8),
    "index_select, shifted": by_range(aten.index_select.default, of_dim, 4, shift=2),
    "index": by_range(aten.index.Tensor, listed, 2, 9),
}


@pytest.mark.parametrize("case", CUTS)
def test_a_cut_becomes_a_slice_of_the_same_values(case):
    built = Built()
    x = built.input("x", 2, N, C)
    graph = built.output(CUTS[case](built, x))
    values = torch.randn(2, N, C)
    for node in graph.find_nodes(op="call_function", target=aten.arange.default) + graph.find_nodes(
        op="call_function", target=aten.arange.start
    ):
        node.kwargs = {}
    (expected,) = run(graph, values)
    assert canonicalize_cuts(graph, lambda size: size == N) == 1
    assert targets(graph)[-1] == "slice"
    torch.testing.assert_close(run(graph, values)[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        piece(aten.chunk.default, 2, 2),
        lambda g, x: g(aten.slice.Tensor, x, 1, 2, 5),
        lambda g, x: g(aten.index_select.default, x, 1, g.input("index", 3, dtype=torch.int64)),
        lambda g, x: g(aten.relu.default, x),
    ],
)
def test_anything_else_stays(make):
    built = Built()
    graph = built.output(make(built, built.input("x", 2, N, C)))
    before = targets(graph)
    assert canonicalize_cuts(graph, lambda size: size == N) == 0
    assert targets(graph) == before
