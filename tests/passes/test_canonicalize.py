"""canonicalize: attention written by hand becomes one node, of equal value; whatever else has a softmax is left alone."""

from __future__ import annotations

import pytest
import torch

from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.find_attention import SDPA, find_attention, module_path
from edit_compile.passes.read_attention import UNREAD
from hand_built import Built, aten, run, targets

B, H, N, M, D = 2, 3, 5, 7, 4
SCALE = 0.3
LOWEST = float("-inf")


def inputs(built, rank=4, dtype=None):
    lead = (B, H) if rank == 4 else (B,)
    return (built.input(n, *lead, s, D, dtype=dtype) for n, s in (("q", N), ("k", M), ("v", M)))


def scores_of(built, q, k):
    return built(aten.matmul.default, q, built(aten.transpose.int, k, -1, -2))


def filled(graph, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            yield (noise > 0) if value.dtype is torch.bool else noise


def same_before_and_after(graph, found=1):
    values = list(filled(graph))
    expected = run(graph, *values)
    assert canonicalize(graph) == found
    graph.lint()
    got = run(graph, *values)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


WAYS = {  # between the scores and the softmax
    "plain": lambda g, s: s,
    "scaled": lambda g, s: g(aten.mul.Tensor, s, SCALE),
    "divided": lambda g, s: g(aten.div.Tensor, s, 1 / SCALE),
    "scaled twice": lambda g, s: g(aten.div.Tensor, g(aten.mul.Tensor, s, 2.0), 3.0),
    "masked": lambda g, s: g(aten.add.Tensor, g(aten.mul.Tensor, s, SCALE), g.input("mask", B, 1, 1, M)),
    "mask first": lambda g, s: g(aten.add.Tensor, g.input("mask", B, 1, 1, M), g(aten.mul.Tensor, s, SCALE)),
    "mask cast": lambda g, s: g(aten.add.Tensor, g(aten.clone.default, s), g.input("mask", M)),
    "filled": lambda g, s: g(aten.masked_fill.Scalar, g(aten.mul.Tensor, s, SCALE), g.input("gone", N, M, dtype=torch.bool), LOWEST),
    "a learned temperature": lambda g, s: g(aten.mul.Tensor, s, g.input("t", H, 1, 1)),
    "divided by a temperature of queries": lambda g, s: g(aten.div.Tensor, s, g.input("t", N, 1)),
    "scaled by key": lambda g, s: g(aten.mul.Tensor, s, g.input("t", B, 1, 1, M)),
    "mask before the scale": lambda g, s: g(aten.mul.Tensor, g(aten.add.Tensor, s, g.input("mask", N, M)), SCALE),
    "a weighted mask": lambda g, s: g(aten.sub.Tensor, s, g.input("mask", N, M), alpha=2),
    "two masks": lambda g, s: g(aten.add.Tensor, g(aten.add.Tensor, s, g.input("mask", N, M)), g.input("mask2", B, 1, 1, M)),
    "masks of both kinds": lambda g, s: g(
        aten.masked_fill.Scalar, g(aten.add.Tensor, s, g.input("mask", N, M)), g.input("gone", B, 1, 1, M, dtype=torch.bool), LOWEST
    ),
    "chosen": lambda g, s: g(aten.where.ScalarOther, g.input("taken", N, M, dtype=torch.bool), s, LOWEST),
    "minus the maximum": lambda g, s: g(aten.sub.Tensor, s, g(aten.amax.default, s, [-1], True)),
    "plus something of queries": lambda g, s: g(aten.add.Tensor, s, g.input("bias", H, N, 1)),
    "in place": lambda g, s: g(aten.add_.Tensor, g(aten.mul.Tensor, s, SCALE), g.input("mask", B, 1, 1, M)),
    "masked in another shape": lambda g, s: g(
        aten.view.default,
        g(aten.add.Tensor, g(aten.view.default, s, [B, H, N, M]), g.input("mask", B, 1, N, M)),
        [B, H, N, M],
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softmax", [(aten.softmax.int, (-1,)), (aten._softmax.default, (3, False))], ids=["softmax", "_softmax"])
def test_by_hand_becomes_one_node_of_the_same_value(way, softmax):
    built = Built()
    q, k, v = inputs(built)
    weights = built(softmax[0], WAYS[way](built, scores_of(built, q, k)), *softmax[1])
    graph = built.output(built(aten.matmul.default, weights, v))
    inputs_first(graph)
    same_before_and_after(graph)
    (attention,) = find_attention(graph)
    assert "softmax" not in targets(graph)
    assert attention.scale is not None
    assert (attention.mask is not None) == (way.startswith(("mask", "filled", "a weighted", "two", "chosen", "in place")))
    assert attention.node.meta["val"].shape == (B, H, N, D)


def inputs_first(graph):
    """Placeholders made late come to the front, where a graph's inputs belong."""
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node is not first:
            first.append(node)
            first = node


def test_dropout_casts_and_copies_between_are_looked_through():
    built = Built(torch.bfloat16)
    q, k, v = inputs(built)
    scores = built(aten.to.dtype, scores_of(built, q, k), torch.float32)
    weights = built(aten.softmax.int, scores, -1)
    weights = built(aten.clone.default, built(aten.dropout.default, built(aten.type_as.default, weights, v), 0.1, False))
    graph = built.output(built(aten.matmul.default, weights, v))
    assert canonicalize(graph) == 1
    assert targets(graph) == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("upcast", [True, False])
def test_operands_of_the_one_node_share_a_dtype(upcast):
    """Scores from upcast queries and keys, weights cast back before the values: the one node takes all in the values' dtype."""
    built = Built(torch.bfloat16)
    q, k, v = inputs(built)
    if upcast:
        q, k = built(aten.to.dtype, q, torch.float32), built(aten.to.dtype, k, torch.float32)
    weights = built(aten.to.dtype, built(aten.softmax.int, scores_of(built, q, k), -1), torch.bfloat16)
    graph = built.output(built(aten.matmul.default, weights, v))
    assert canonicalize(graph) == 1
    (attention,) = find_attention(graph)
    assert {n.meta["val"].dtype for n in (attention.query, attention.key, attention.value)} == {torch.bfloat16}
    assert run(graph, *(torch.randn(n.meta["val"].shape).bfloat16() for n in graph.nodes if n.op == "placeholder"))


@pytest.mark.parametrize(("beta", "alpha"), [(0, SCALE), (1, SCALE)])
def test_scores_added_to_a_mask_in_one_product(beta, alpha):
    """baddbmm: what torch's own MultiheadAttention and older attention processors write."""
    built = Built()
    q, k, v = inputs(built, rank=3)
    mask = built.input("mask", B, N, M)
    scores = built(aten.baddbmm.default, mask, q, built(aten.transpose.int, k, 1, 2), beta=beta, alpha=alpha)
    graph = built.output(built(aten.bmm.default, built(aten.softmax.int, scores, -1), v))
    same_before_and_after(graph)
    (attention,) = find_attention(graph)
    assert attention.scale == pytest.approx(SCALE)
    assert (attention.mask is not None) == bool(beta)


MASKS = [None, (N, M), (B, 1, M), (B, N, M)]


@pytest.mark.parametrize(("by_hand", "mask_shape"), [(True, (M,)), *((by_hand, mask) for by_hand in (True, False) for mask in MASKS)])
def test_heads_folded_into_the_batch_become_a_dimension(by_hand, mask_shape):
    """What is found downstream is (B, H, N, D): designs take the second dimension for heads."""
    built = Built()
    q, k, v = inputs(built, rank=3)
    mask = built.input("mask", *mask_shape) if mask_shape else None
    if by_hand:
        scores = scores_of(built, q, k)
        scores = built(aten.add.Tensor, scores, mask) if mask else scores
        y = built(aten.bmm.default, built(aten.softmax.int, scores, 2), v)
    else:
        y = built(SDPA, q, k, v, mask) if mask else built(SDPA, q, k, v)
    graph = built.output(y)
    same_before_and_after(graph, found=int(by_hand))
    (attention,) = find_attention(graph)
    assert attention.query.meta["val"].shape == (B, 1, N, D)
    assert attention.node.meta["val"].shape == (B, 1, N, D)


def test_scores_and_output_with_several_users():
    built = Built()
    q, k, v = inputs(built)
    scores = scores_of(built, q, k)
    y = built(aten.matmul.default, built(aten.softmax.int, scores, -1), v)
    graph = built.output(built(aten.relu.default, y), built(aten.sigmoid.default, y), built(aten.sum.default, scores))
    same_before_and_after(graph)
    assert targets(graph).count("matmul") == 1  # the scores' own, for their other user


def test_weights_that_nobody_reads_do_not_count():
    """torch's own MultiheadAttention averages its weights over heads, whether the caller wants them or not."""
    built = Built()
    q, k, v = inputs(built)
    weights = built(aten.softmax.int, scores_of(built, q, k), -1)
    built(aten.mean.dim, weights, [1])
    same_before_and_after(built.output(built(aten.matmul.default, weights, v)))


def test_keys_that_come_transposed_already():
    built = Built()
    q, k, v = built.input("q", B, H, N, D), built.input("k", B, H, D, M), built.input("v", B, H, M, D)
    graph = built.output(built(aten.matmul.default, built(aten.softmax.int, built(aten.matmul.default, q, k), -1), v))
    same_before_and_after(graph)
    assert find_attention(graph)[0].key.meta["val"].shape == (B, H, M, D)


def test_two_attentions_and_a_softmax_of_something_else():
    built = Built()
    q, k, v = inputs(built)
    first = built(aten.matmul.default, built(aten.softmax.int, scores_of(built, q, k), -1), v)
    second = built(aten.matmul.default, built(aten.softmax.int, scores_of(built, first, k), -1), v)
    graph = built.output(second, built(aten.softmax.int, v, -1))
    same_before_and_after(graph, found=2)
    assert targets(graph).count("softmax") == 1


def test_the_node_belongs_to_the_module_of_the_product():
    built = Built()
    q, k, v = inputs(built)
    weights = built(aten.softmax.int, scores_of(built, q, k), -1, at="block.attn.softmax")
    graph = built.output(built(aten.matmul.default, weights, v, at="block.attn"))
    canonicalize(graph)
    assert module_path(find_attention(graph)[0].node) == "block.attn"


LEFT_ALONE = {
    "over queries": lambda g, s, v: g(aten.matmul.default, g(aten.softmax.int, s, 2), v),
    "no product": lambda g, s, v: g(aten.softmax.int, s, -1),
    "weights used twice": lambda g, s, v: twice(g, g(aten.softmax.int, s, -1), v),
    "filled with no lowest value": lambda g, s, v: g(
        aten.matmul.default, g(aten.softmax.int, g(aten.masked_fill.Scalar, s, g.input("gone", N, M, dtype=torch.bool), 0.0), -1), v
    ),
    "not a product": lambda g, s, v: g(aten.matmul.default, g(aten.softmax.int, g(aten.tanh.default, s), -1), v),
}


def twice(built, weights, v):
    return built(aten.add.Tensor, built(aten.matmul.default, weights, v), built(aten.sum.default, weights))


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_not_plain_attention_stays(case):
    built = Built()
    q, k, v = inputs(built)
    graph = built.output(LEFT_ALONE[case](built, scores_of(built, q, k), v))
    inputs_first(graph)
    before = str(graph)
    assert canonicalize(graph) == 0
    assert str(graph) == before


def test_without_a_target_nothing_changes():
    built = Built()
    graph = built.output(built(aten.relu.default, built.input("x", 2, 3)))
    before = str(graph)
    assert canonicalize(graph) == 0
    assert str(graph) == before


def test_a_write_into_a_part_of_the_scores_is_not_lost():
    built = Built()
    q, k, v = inputs(built)
    scores = built(aten.mul.Tensor, scores_of(built, q, k), SCALE)
    built(aten.fill_.Scalar, built(aten.slice.Tensor, scores, -1, 0, 2), LOWEST)
    weights = built(aten.softmax.int, scores, -1)
    same_before_and_after(built.output(built(aten.matmul.default, weights, v)), found=0)
    assert [node.meta[UNREAD] for node in built.graph.nodes if UNREAD in node.meta] == [
        "a part of its scores is written anew before the softmax"
    ]
