"""classify_tokens: what carries the output is IMAGE, other inputs are TEXT, parameters are OTHER; and the image's grid."""

from __future__ import annotations

import operator

import pytest

from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import AxisSegment
from edit_compile.passes.classify_tokens import TokenMap, classify_tokens
from hand_built import Built, aten, attend

H, W, C = 5, 7, 8
N, T = H * W, 11


def image_tokens(built, name="x", height=H, width=W):
    """An image's tokens: (B, C, h, w) to (B, h*w, C)."""
    x = built.input(name, 2, C, height, width)
    return built(aten.transpose.int, built(aten.flatten.using_ints, x, 2), 1, 2)


def answer(built, tokens, height=H, width=W):
    """Tokens back to an image, through the last Linear."""
    return built(aten.view.default, built(aten.transpose.int, built.linear(tokens, "out", C), 1, 2), [2, C, height, width])


def layout(built, node, *outputs):
    """The kinds and sizes along a node's token axis, and its grid in the example."""
    built.output(*outputs)
    tokens = classify_tokens(built.capture())
    axis = tokens.axes[node][1]
    found, sizes = tokens.layout(axis)
    grid = tokens.grid(axis)
    return [(str(s.kind), n) for s, n in zip(found.segments, sizes, strict=True)], grid and grid.sizes


def text(built, name="t", length=T):
    return built.input(name, 2, length, C)


@pytest.mark.parametrize("order", [("x", "t"), ("t", "x"), ("c", "x"), ("c", "r", "x", "t"), ("t", "x", "u")])
def test_joined_tokens_in_any_order(order):
    """x the image, t and u two texts, c and r class and register tokens."""
    built = Built()
    make = {
        "x": lambda: image_tokens(built),
        "t": lambda: text(built),
        "u": lambda: text(built, "u", 3),
        "c": lambda: built(aten.expand.default, built.parameter("cls", 1, 1, C), [2, -1, -1]),
        "r": lambda: built(aten.expand.default, built.parameter("registers", 1, 4, C), [2, -1, -1]),
    }
    joint = built(aten.cat.default, [make[name]() for name in order], 1)
    sizes = {"x": ("image", N), "t": ("text", T), "u": ("text", 3), "c": ("other", 1), "r": ("other", 4)}
    start = sum(sizes[name][1] for name in order[: order.index("x")])
    out = built(aten.slice.Tensor, joint, 1, start, start + N)
    expected = [sizes[name] for name in order]
    if order[:2] == ("c", "r"):
        expected[:2] = [("other", 5)]
    assert layout(built, joint, answer(built, out)) == (expected, (str(H), str(W)))


def test_neighbours_of_one_kind_are_one_segment_of_known_length():
    """The number of class and register tokens is known, so where the image begins follows from it."""
    segments = (AxisSegment(1, "1"), AxisSegment(4, "4"), AxisSegment(N, "h*w", frozenset({"x"})))
    found, sizes = TokenMap({}, frozenset({"x"})).layout(segments)
    assert [s.length for s in found.segments] == ["5", "h*w"]
    assert sizes == (5, N)
    texts = (AxisSegment(3, "t", frozenset({"t"})), AxisSegment(2, "2", frozenset({"t"})))
    assert TokenMap({}, frozenset()).layout(texts)[0].segments[0].length == "t + 2"


def test_neither_names_nor_order_of_inputs_matter():
    built = Built()
    image_like = text(built, "image_latents")
    tokens = image_tokens(built, "prompt")
    joint = built(aten.cat.default, [image_like, tokens], 1)
    out = answer(built, built(aten.slice.Tensor, joint, 1, T, T + N))
    assert layout(built, joint, out)[0] == [("text", T), ("image", N)]


@pytest.mark.parametrize("cut", [aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default])
def test_equal_sizes_are_told_apart_by_where_they_come_from(cut):
    built = Built()
    joint = built(aten.cat.default, [text(built, "t", N), image_tokens(built)], 1)
    parts = built(cut, joint, {aten.chunk.default: 2, aten.split.Tensor: N, aten.split_with_sizes.default: [N, N]}[cut], 1)
    first, second = (built(operator.getitem, parts, i) for i in range(2))
    built.output(answer(built, second), built(aten.sum.default, first))
    tokens = classify_tokens(built.capture())
    assert [str(tokens.layout(tokens.axes[n][1])[0].segments[0].kind) for n in (first, second)] == ["text", "image"]


def test_kinds_survive_blocks():
    built = Built()
    joint = built(aten.cat.default, [image_tokens(built), text(built)], 1)
    y = joint
    for block in ("blocks.0", "blocks.1"):
        y = built(aten.add.Tensor, y, attend(built, y, block))
        y = built(aten.add.Tensor, y, built(aten.layer_norm.default, y, [C]))
    out = answer(built, built(aten.slice.Tensor, y, 1, 0, N))
    assert layout(built, y, out) == ([("image", N), ("text", T)], (str(H), str(W)))


def test_two_inputs_that_both_become_the_output_are_both_images():
    """Image tokens split over two inputs: neither has a grid for both."""
    built = Built()
    joint = built(aten.cat.default, [image_tokens(built, "upper", 2, W), image_tokens(built, "lower", 3, W)], 1)
    assert layout(built, joint, answer(built, joint)) == ([("image", N)], None)


def test_an_image_that_only_conditions_is_not_the_image():
    """Its tokens are joined, but the output has the noisy image's positions alone."""
    built = Built()
    joint = built(aten.cat.default, [image_tokens(built), image_tokens(built, "reference", 2, 3)], 1)
    out = answer(built, built(aten.slice.Tensor, joint, 1, 0, N))
    assert layout(built, joint, out)[0] == [("image", N), ("text", 6)]


def test_an_image_joined_along_channels_is_part_of_the_image():
    built = Built()
    x, mask = built.input("x", 2, C - 1, H, W), built.input("mask", 2, 1, H, W)
    both = built(aten.cat.default, [x, mask], 1)
    tokens = built(aten.transpose.int, built(aten.flatten.using_ints, both, 2), 1, 2)
    built.output(answer(built, tokens))
    assert classify_tokens(built.capture()).image_inputs == {"x", "mask"}


def test_without_positions_in_the_output_the_input_of_most_dimensions_is_the_image():
    """A classifier's output has none."""
    built = Built()
    tokens = image_tokens(built)
    joint = built(aten.cat.default, [tokens, text(built)], 1)
    logits = built.linear(built(aten.mean.dim, joint, [1]), "head", 10)
    assert layout(built, joint, logits)[0] == [("image", N), ("text", T)]


def test_video_has_a_grid_of_three():
    built = Built()
    x = built.input("x", 2, C, 3, H, W)
    tokens = built(aten.transpose.int, built(aten.flatten.using_ints, x, 2), 1, 2)
    out = built(aten.view.default, built(aten.transpose.int, tokens, 1, 2), [2, C, 3, H, W])
    assert layout(built, tokens, out) == ([("image", 3 * N)], ("3", str(H), str(W)))


def test_patches_keep_the_grid_of_what_is_left_and_columns_first_is_columns_first():
    built = Built()
    x = built.input("x", 2, 2, 2 * H, 2 * W)
    patches = built(aten.view.default, x, [2, 2, H, 2, W, 2])
    by_row = built(aten.reshape.default, built(aten.permute.default, patches, [0, 2, 4, 1, 3, 5]), [2, N, C])
    by_column = built(aten.reshape.default, built(aten.permute.default, patches, [0, 4, 2, 1, 3, 5]), [2, N, C])
    built.output(by_row, by_column)
    tokens = classify_tokens(built.capture())
    assert [tokens.grid(tokens.axes[n][1]).sizes for n in (by_row, by_column)] == [("5", "7"), ("7", "5")]
    assert [tokens.grid_sizes(tokens.axes[n][1]) for n in (by_row, by_column)] == [(5, 7), (7, 5)]


def test_tokens_that_come_packed_have_no_grid_but_a_number():
    built = Built()
    x = text(built, "packed", N)
    built.output(x)
    tokens = classify_tokens(built.capture())
    assert tokens.grid(tokens.axes[x][1]) is None
    assert tokens.grid_sizes(tokens.axes[x][1]) == (N,)
    assert tokens.kind(tokens.axes[x][1][0]) is TokenKind.IMAGE
