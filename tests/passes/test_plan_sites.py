"""plan_sites: every attention gets an answer, and a reason to keep it is the right one."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from torch import nn

from edit_compile.config import LinearizeConfig, Rule
from edit_compile.errors import PlanError
from edit_compile.passes.canonicalize import SDPA, canonicalize
from edit_compile.passes.capture import capture
from edit_compile.passes.classify_tokens import classify_tokens
from edit_compile.passes.find_attention import find_attention
from edit_compile.passes.find_feed_forward import find_feed_forward
from edit_compile.passes.masks import same_for_all_queries
from edit_compile.passes.plan_sites import plan_sites
from hand_built import Built, aten, attend, heads

B, H, W, T, C = 2, 5, 7, 11, 8
N = H * W


def tokens_of(built, name="x", height=H, width=W):
    return built(aten.transpose.int, built(aten.flatten.using_ints, built.input(name, B, C, height, width), 2), 1, 2)


def plans(built, tokens, *others, height=H, width=W, **options):
    """The plan of a graph whose output is the picture made of `tokens`."""
    last = built.linear(tokens, "out", C)
    sums = [built(aten.sum.default, other) for other in others]
    built.output(built(aten.view.default, built(aten.transpose.int, last, 1, 2), [B, C, height, width]), *sums)
    captured = built.capture()
    canonicalize(captured.graph)
    graph = captured.graph
    return plan_sites(graph, find_attention(graph), find_feed_forward(graph), classify_tokens(captured), LinearizeConfig(**options))


def tried(candidate):
    """The designs that would be tried at a site."""
    return [choice.design.name for choice in candidate.choices]


def joint(built, *, text_first=False):
    """Image and text tokens in one axis."""
    parts = [tokens_of(built), built.input("t", B, T, C)]
    return built(aten.cat.default, parts[::-1] if text_first else parts, 1)


def image_of(built, y, start=0):
    return built(aten.slice.Tensor, y, 1, start, start + N)


def test_image_tokens_alone_and_joined_with_text_are_candidates():
    built = Built()
    x = attend(built, joint(built), "blocks.0.joint")
    y = attend(built, image_of(built, x), "blocks.0.image")
    first, second = plans(built, y)
    assert (first.plan.path, second.plan.path) == ("blocks.0.joint", "blocks.0.image")
    assert tried(first) == tried(second) == ["mm-edit", "edit"]
    assert first.plan.query_sizes == (N, T)
    assert second.plan.grid.sizes == (str(H), str(W))
    assert second.plan.grid_sizes == (H, W)


# Reasons to keep a site. Each case gives the tokens that become the output, and whatever else is an output.


def no_image(g):
    return tokens_of(g), attend(g, g.input("t", B, T, C), "a")


def cross(g):
    return (attend(g, tokens_of(g), "a", keys=g.input("t", B, T, C)),)


def text_queries(g):
    x = tokens_of(g)
    return x, attend(g, g.input("t", B, T, C), "a", keys=x)


def other_order(g):
    x, t = tokens_of(g), g.input("t", B, T, C)
    keys = g(aten.cat.default, [t, x], 1)
    return (image_of(g, attend(g, g(aten.cat.default, [x, t], 1), "a", keys=keys)),)


def image_queries_of_joint_keys(g):
    x = tokens_of(g)
    return (attend(g, x, "a", keys=g(aten.cat.default, [x, g.input("t", B, T, C)], 1)),)


def pooled(g):
    x = tokens_of(g)
    return (attend(g, x, "a", keys=g(aten.slice.Tensor, x, 1, 0, 17)),)


def several_runs(g):
    x, t = tokens_of(g), g.input("t", B, T, C)
    parts = [g(aten.slice.Tensor, x, 1, 0, 10), t, g(aten.slice.Tensor, x, 1, 10, N)]
    y = attend(g, g(aten.cat.default, parts, 1), "a")
    return (g(aten.cat.default, [g(aten.slice.Tensor, y, 1, 0, 10), g(aten.slice.Tensor, y, 1, 10 + T, N + T)], 1),)


def outside(g):
    x = tokens_of(g)
    q, k, v = (heads(g, g.linear(x, n, C), 2) for n in "qkv")
    return (g(aten.flatten.using_ints, g(aten.transpose.int, g(SDPA, q, k, v), 1, 2), 2),)


def twice(g):
    return (attend(g, attend(g, tokens_of(g), "a"), "a"),)


def by_hand_arguments(g, *args, rank=4, **kwargs):
    x = tokens_of(g)
    q, k, v = (heads(g, g.linear(x, f"a.{n}", C), 2, "a") for n in "qkv")
    if rank == 5:
        q, k, v = (g(aten.unsqueeze.default, n, 1, at="a") for n in (q, k, v))
    y = g(SDPA, q, k, v, *args, at="a", **kwargs)
    y = g(aten.squeeze.dim, y, 1, at="a") if rank == 5 else y
    return (g(aten.flatten.using_ints, g(aten.transpose.int, y, 1, 2, at="a"), 2, at="a"),)


def causal(g):
    return by_hand_arguments(g, None, 0.0, True)


def five_dimensions(g):
    return by_hand_arguments(g, rank=5)


def symbolic_scale(g):
    return by_hand_arguments(g, scale=g(operator.truediv, 1, 8.0))


def mask_by_query(g):
    return by_hand_arguments(g, g.input("mask", N, N))


def no_linear(g):
    x = heads(g, g(aten.matmul.default, tokens_of(g), g.before_calls("w", C, C), at="a"), 2, "a")
    return (g(aten.flatten.using_ints, g(aten.transpose.int, g(SDPA, x, x, x, at="a"), 1, 2), 2),)


def windows(g):
    x = g(aten.view.default, g(aten.permute.default, g.input("x", B, C, 6, 10), [0, 2, 3, 1]), [B, 3, 2, 2, 5, C])
    inside = g(aten.reshape.default, g(aten.permute.default, x, [0, 1, 3, 2, 4, 5]), [B * 6, 10, C])
    y = g(aten.view.default, attend(g, inside, "a"), [B, 3, 2, 2, 5, C])
    return (g(aten.reshape.default, g(aten.permute.default, y, [0, 1, 3, 2, 4, 5]), [B, 60, C]),)


def rows(g):
    x = g(aten.permute.default, g.input("x", B, C, 6, 10), [0, 2, 3, 1])
    y = attend(g, g(aten.reshape.default, x, [B * 6, 10, C]), "a")
    return (g(aten.reshape.default, y, [B, 60, C]),)


def blocks(g):
    x = g(aten.view.default, g(aten.permute.default, g.input("x", B, C, 6, 10), [0, 2, 3, 1]), [B, 3, 2, 2, 5, C])
    return (attend(g, g(aten.reshape.default, g(aten.permute.default, x, [0, 1, 3, 2, 4, 5]), [B, 60, C]), "a"),)


def video(g):
    x = g(aten.transpose.int, g(aten.flatten.using_ints, g.input("x", B, C, 3, 4, 5), 2), 1, 2)
    return (attend(g, x, "a"),)


def nested(g):
    x = tokens_of(g)
    y = attend(g, x, "a.inner", keys=g.input("t", B, T, C))
    q, k, v = (heads(g, g.linear(y, f"a.{n}", C), 2, "a") for n in "qkv")
    return (g(aten.flatten.using_ints, g(aten.transpose.int, g(SDPA, q, k, v, at="a"), 1, 2), 2),)


def unread(g):
    x = tokens_of(g)
    q, k, v = (g.linear(x, f"a.{n}", C) for n in "qkv")
    scores = g(aten.tanh.default, g(aten.matmul.default, q, g(aten.transpose.int, k, 1, 2), at="a"), at="a")
    return (g(aten.matmul.default, g(aten.softmax.int, scores, -1, at="a"), v, at="a"),)


def linear(g):
    x = tokens_of(g)
    q, k, v = (g.linear(x, f"a.{n}", C) for n in "qkv")
    summed = g(aten.matmul.default, g(aten.transpose.int, k, 1, 2), v, at="a")
    return (g(aten.matmul.default, q, summed, at="a"),)


REASONS = {
    no_image: "no image tokens take part",
    cross: "cross-attention: linear in image tokens already",
    text_queries: "the image tokens are keys and values only: linear in image tokens already",
    pooled: r"the image tokens of the queries \[image 35\] are not those of the keys \[image 17\]: not self-attention",
    several_runs: "the image tokens are in several runs",
    outside: "the attention is in the model's own forward, outside any submodule",
    twice: "one module runs several attentions",
    nested: "one module runs several attentions",
    five_dimensions: "its queries have 5 dimensions",
    symbolic_scale: "the softmax scale depends on the sizes of the inputs",
    windows: "attention within rows, columns or windows",
    rows: "attention within rows, columns or windows",
    blocks: "the image tokens are in blocks, not row by row: 3 x 2 x 2 x 5",
    unread: "softmax attention in a form that is not recognised",
    linear: "already linear attention",
}
PICTURES = {windows: (6, 10), rows: (6, 10), blocks: (6, 10), video: (3, 20)}


NOTHING_TO_DO = (no_image, cross, text_queries, linear)  # kept, for they are not quadratic: nothing stands in the way


@pytest.mark.parametrize("case", REASONS, ids=lambda case: case.__name__)
def test_a_site_is_kept_for_its_reason(case):
    built = Built()
    tokens, *others = case(built)
    height, width = PICTURES.get(case, (H, W))
    candidate = plans(built, tokens, *others, height=height, width=width)[-1]
    site = candidate.plan
    assert candidate.choices == ()
    assert site.action == "keep"
    assert re.match(REASONS[case], site.reason), site.reason
    assert site.path == ("" if case is outside else "a")
    if case in NOTHING_TO_DO:
        assert site.refusal is None
        return
    assert site.refusal.reason == site.reason
    assert site.refusal.node in {node.name for node in built.graph.nodes}


FACTS = {  # that a design judges
    causal: {"causal": True},
    mask_by_query: {"mask": "by_query"},
    no_linear: {"mask": "none"},
    video: {"grid_sizes": (3, 4, 5)},
    other_order: {"query_sizes": (N, T), "key_sizes": (T, N)},
    image_queries_of_joint_keys: {"query_sizes": (N,), "key_sizes": (N, T)},
}


@pytest.mark.parametrize("case", FACTS, ids=lambda case: case.__name__)
def test_what_a_design_may_take_is_a_fact(case):
    built = Built()
    tokens, *others = case(built)
    height, width = PICTURES.get(case, (H, W))
    (candidate,) = plans(built, tokens, *others, height=height, width=width)
    assert tried(candidate) == ["mm-edit", "edit"]
    assert {name: getattr(candidate.plan, name) for name in FACTS[case]} == FACTS[case]


class TextsAround(nn.Module):
    """Text before and after the image, in numbers that change from call to call."""

    def __init__(self, registers=0):
        super().__init__()
        self.patch, self.attn, self.out = nn.Conv2d(3, C, 2, stride=2), nn.MultiheadAttention(C, 2, batch_first=True), nn.Linear(C, 3)
        self.registers = nn.Parameter(torch.zeros(1, registers, C)) if registers else None

    def forward(self, x, before, after):
        picture = self.patch(x)
        image = picture.flatten(2).transpose(1, 2)
        if self.registers is not None:
            before = self.registers.expand(x.shape[0], -1, -1)
        joint = torch.cat([before, image, after], 1)
        y = self.attn(joint, joint, joint)[0][:, before.shape[1] : before.shape[1] + image.shape[1]]
        return self.out(y).transpose(1, 2).unflatten(2, picture.shape[2:])


@pytest.mark.parametrize("registers", [0, 4])
def test_where_the_image_begins_must_follow_from_one_side(registers):
    inputs = {"x": torch.zeros(2, 3, 10, 14), "before": torch.zeros(2, 4, C), "after": torch.zeros(2, 3, C)}
    captured = capture(TextsAround(registers), inputs)
    assert canonicalize(captured.graph) == 1  # torch's own attention, as it runs where it returns its weights
    tokens = classify_tokens(captured)
    (candidate,) = plan_sites(captured.graph, find_attention(captured.graph), [], tokens, LinearizeConfig())
    site = candidate.plan
    assert [str(s.kind) for s in site.query_layout.segments] == ["other" if registers else "text", "image", "text"]
    if registers:
        assert candidate.choices
    else:
        assert re.match(r"where the image tokens begin in \[text .*, image .*, text .*\] does not follow from the grid", site.reason)


def two_sites(**options):
    built = Built()
    y = attend(built, image_of(built, attend(built, joint(built), "blocks.0.joint")), "blocks.1.image")
    return {candidate.plan.path: candidate for candidate in plans(built, y, **options)}


@pytest.mark.parametrize(
    ("include", "exclude", "rewritten"),
    [
        (("*",), (), {"blocks.0.joint", "blocks.1.image"}),
        (("blocks.0.*",), (), {"blocks.0.joint"}),
        (("*.image", "blocks.0.*"), ("blocks.0.*",), {"blocks.1.image"}),
        (("*",), ("*",), set()),
        (("blocks.[!0].*",), (), {"blocks.1.image"}),
    ],
)
def test_globs_select_sites(include, exclude, rewritten):
    sites = two_sites(include=include, exclude=exclude)
    assert {path for path, candidate in sites.items() if candidate.choices} == rewritten
    assert all(c.plan.reason == "left out by include and exclude" for path, c in sites.items() if path not in rewritten)


@pytest.mark.parametrize("options", [{"include": ("nowhere",)}, {"exclude": ("nowhere",)}, {"include": ("*", "BLOCKS.*", "nowhere")}])
def test_a_glob_that_matches_nothing_is_an_error_that_lists_the_sites(options):
    with pytest.raises(PlanError, match=r"'(nowhere|BLOCKS\.\*)' matches no site; there are: blocks\.0\.joint, blocks\.1\.image"):
        two_sites(**options)


RULES = {
    "the first that matches": (
        (Rule("*.joint", "mm-edit"), Rule("*", "edit")),
        {"blocks.0.joint": ["mm-edit", "edit"], "blocks.1.image": ["edit"]},
    ),
    "kept by a rule": ((Rule("*.joint", "keep"), Rule("*", "edit")), {"blocks.0.joint": [], "blocks.1.image": ["edit"]}),
    "no rule": ((Rule("*.image", "edit"),), {"blocks.0.joint": [], "blocks.1.image": ["edit"]}),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_choose_designs_by_path(case):
    rules, expected = RULES[case]
    sites = two_sites(rules=rules)
    assert {path: tried(candidate) for path, candidate in sites.items()} == expected
    reason = {"kept by a rule": "kept by the rule for '*.joint'", "no rule": "no rule names it"}.get(case, "")
    assert sites["blocks.0.joint"].plan.reason == reason


def test_every_site_has_a_grid_of_its_own():
    built = Built()
    x = tokens_of(built, height=6, width=10)
    small = built(aten.avg_pool2d.default, built(aten.view.default, built(aten.transpose.int, x, 1, 2), [B, C, 6, 10]), [2, 2])
    small = attend(built, built(aten.transpose.int, built(aten.flatten.using_ints, small, 2), 1, 2), "down")
    by_column = built(aten.transpose.int, built(aten.view.default, x, [B, 6, 10, C]), 1, 2)
    attended = attend(built, built(aten.reshape.default, by_column, [B, 60, C]), "by_column")
    y = attend(built, attend(built, x, "first"), "second")
    sites = plans(built, y, small, attended, height=6, width=10)
    assert all(candidate.choices for candidate in sites)
    grids = {candidate.plan.path: candidate.plan.grid_sizes for candidate in sites}
    assert grids == {"first": (6, 10), "second": (6, 10), "down": (3, 5), "by_column": (10, 6)}


def row(g):
    return g.input("row", B, 1, 1, N, dtype=torch.bool)


def full(g):
    return g.input("full", N, N)


def times_column(g, op):
    keys = g.input("keys", B, N, dtype=torch.bool)
    by_key, by_query = (g(aten.unsqueeze.default, g(aten.unsqueeze.default, keys, 1), d) for d in (2, 3))
    return g(op, by_key, by_query)


def expanded(g):
    return g(aten.expand.default, row(g), [B, 2, N, N])


def float_of(g, node):
    return g(aten.mul.Tensor, g(aten.to.dtype, node, torch.float32), -1e4)


MASKS = {
    "a row": (row, True),
    "a row as numbers": (lambda g: float_of(g, row(g)), True),
    "a row, expanded": (expanded, True),
    "a row, expanded, turned over and cast": (lambda g: float_of(g, g(aten.logical_not.default, expanded(g))), True),
    "joined rows": (lambda g: g(aten.cat.default, [expanded(g), expanded(g)], -1), True),
    "keys and queries of padding": (lambda g: times_column(g, aten.mul.Tensor), True),
    "keys and queries of padding, as a mask to add": (lambda g: float_of(g, times_column(g, aten.bitwise_and.Tensor)), True),
    "one for each query": (full, False),
    "a row and a bias": (lambda g: g(aten.add.Tensor, float_of(g, row(g)), full(g)), False),
    "a bias and a row": (lambda g: g(aten.add.Tensor, full(g), float_of(g, row(g))), False),
    "queries see their own picture only": (lambda g: times_column(g, aten.eq.Tensor), False),
    "keys or queries": (lambda g: times_column(g, aten.bitwise_or.Tensor), False),
    "lower triangle": (lambda g: g(aten.tril.default, g(aten.ones.default, [N, N])), False),
    "lower triangle of a row": (lambda g: g(aten.tril.default, expanded(g)), False),
    "joined queries": (lambda g: g(aten.cat.default, [row(g), g.input("other", B, 1, 1, N, dtype=torch.bool)], 2), False),
    "chosen by query": (lambda g: g(aten.where.self, full_of_bool(g), float_of(g, row(g)), float_of(g, row(g))), False),
}


def full_of_bool(g):
    return g(aten.gt.Scalar, full(g), 0)


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_that_differs_from_query_to_query_is_told_by_how_it_is_made(case):
    make, same = MASKS[case]
    built = Built()
    mask = make(built)
    assert same_for_all_queries(mask, mask) is same


def test_a_mask_by_key_lets_the_site_be_rewritten():
    built = Built()
    (candidate,) = plans(built, *by_hand_arguments(built, expanded(built)))
    assert candidate.choices
    assert candidate.plan.mask == "by_key"
