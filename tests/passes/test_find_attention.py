"""find_attention: every attention, with the module that holds it and its projections."""

from __future__ import annotations

import pytest

from edit_compile.passes.canonicalize import SDPA
from edit_compile.passes.find_attention import find_attention, projections, site_path
from edit_compile.passes.graph_walk import module_path
from hand_built import Built, aten, attend, heads


def site(projection_paths, attention_path, between=None):
    """An attention at a path with its query's, key's and value's Linear at others."""
    built = Built()
    x = built.input("x", 2, 5, 8)
    operands = [heads(built, built.linear(x, path, 8), 2) for path in projection_paths]
    if between:
        operands = [built(aten.relu.default, n, at=between) for n in operands]
    return built, built(SDPA, *operands, at=attention_path)


@pytest.mark.parametrize(
    ("projections", "attention", "expected"),
    [
        (("blocks.3.attn.q", "blocks.3.attn.k", "blocks.3.attn.v"), "blocks.3.attn", "blocks.3.attn"),
        (("attn.q", "attn.k", "attn.v"), "attn.core", "attn"),
        (("block.qkv.q", "block.qkv.k", "block.qkv.v"), "block.core", "block"),
        (("block.q", "block.k", "other.v"), "block.core", ""),
        (("block.attn.q", "block.context.k", "block.context.v"), "block.attn", "block"),
        (("block1.q", "block1.k", "block1.v"), "block10", ""),
        (("q", "k", "v"), "", ""),
    ],
    ids=["own", "below", "siblings", "in a stranger", "context beside", "names with a common start", "root"],
)
def test_the_site_holds_the_attention_and_its_projections(projections, attention, expected):
    built, node = site(projections, attention)
    graph = built.output(node)
    assert site_path(node) == expected
    assert [a.path for a in find_attention(graph)] == [expected]


def test_what_lies_between_does_not_widen_the_site():
    _, node = site(("b.attn.q", "b.attn.k", "b.attn.v"), "b.attn", between="rope")
    assert site_path(node) == "b.attn"


def test_projections_are_the_nearest_on_every_way_back():
    built = Built()
    x = built.input("x", 2, 5, 8)
    near = [built.linear(built.linear(x, f"far{i}", 8), f"near{i}", 8) for i in range(2)]
    joined = built(aten.cat.default, [*near, x], 1)
    assert {module_path(n) for n in projections(joined)} == {"near0", "near1"}
    assert not list(projections(x))


def test_attentions_of_one_module_are_counted():
    built = Built()
    x = built.input("x", 2, 5, 8)
    once = attend(built, x, "a")
    graph = built.output(attend(built, attend(built, once, "b"), "a"))
    assert [(a.path, a.index) for a in find_attention(graph)] == [("a", 0), ("b", 0), ("a", 1)]


@pytest.mark.parametrize("by_name", [True, False])
def test_arguments_are_read_by_place_and_by_name(by_name):
    built = Built()
    q, mask = built.input("q", 2, 2, 5, 4), built.input("mask", 5, 5)
    if by_name:
        node = built(SDPA, q, q, q, attn_mask=mask, scale=0.5)
        causal = built(SDPA, q, q, q, is_causal=True)
    else:
        node = built(SDPA, q, q, q, mask, 0.0, False, scale=0.5)
        causal = built(SDPA, q, q, q, None, 0.0, True)
    first, second = find_attention(built.output(node, causal))
    assert (first.query, first.mask, first.scale, first.causal) == (q, mask, 0.5, False)
    assert (second.mask, second.scale, second.causal) == (None, None, True)


def test_a_graph_without_attention():
    built = Built()
    graph = built.output(built.linear(built.input("x", 2, 5, 8), "a", 8))
    assert find_attention(graph) == []
