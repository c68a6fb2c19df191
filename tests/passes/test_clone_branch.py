"""clone_branch: the key's way again, on thinned tokens: sizes follow, tables are sampled, cuts through the image are refused."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from edit_compile.errors import RewriteError
from edit_compile.passes.axes.algebra import AxisSegment, axis_size
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.clone_branch import BranchCloner
from edit_compile.passes.graph_walk import shape_of
from edit_compile.passes.site_graph import IMAGE_SOURCE, image_place, is_image
from hand_built import Built, aten

B, H, W, C = 2, 5, 7, 8
N, T, R = H * W, 11, 4  # tokens of the image, of text, of registers
SHORT = 3 * 4  # ceil(5/2) * ceil(7/2)

IMAGE_SEGMENT, TEXT_SEGMENT = AxisSegment(N, "h*w", frozenset({IMAGE_SOURCE})), AxisSegment(T, "t", frozenset({"others"}))
REGISTERS = AxisSegment(R, str(R), frozenset({"others"}))
KNOWN_TEXT = AxisSegment(T, str(T), frozenset({"others"}))
LAYOUTS = {
    "image": (IMAGE_SEGMENT,),
    "image, text": (IMAGE_SEGMENT, TEXT_SEGMENT),
    "registers, image, text": (REGISTERS, IMAGE_SEGMENT, TEXT_SEGMENT),
}
KNOWN = {"image, text": (IMAGE_SEGMENT, KNOWN_TEXT), "registers, image, text": (REGISTERS, IMAGE_SEGMENT, KNOWN_TEXT)}


def sample(x, dim, front=0):
    """The reference: every second row and column of the image part, by its places."""
    places = [front + r * W + c for r in range(0, H, 2) for c in range(0, W, 2)]
    behind = range(front + N, x.shape[dim])
    return x.index_select(dim, torch.tensor([*range(front), *places, *behind]))


def both(segments, make, *inputs):
    """`make(x)` at full length, its branch on x thinned, and the former sampled along a dimension; x is (B, tokens, C)."""
    length = axis_size(segments)
    built = Built()
    x, short = built.input("x", B, length, C), built.input("short", B, length - N + SHORT, C)
    others = [built.input(f"table{i}", *shape) for i, shape in enumerate(inputs)]
    grid = built.input("grid", H, W)
    y = make(built, x, *others)
    graph = built.graph
    axes = flow_axes(
        graph, lambda n: tuple(segments if s == length else (AxisSegment(s, str(s)),) for s in shape_of(n)) if n is not short else None
    )
    compressed = BranchCloner(graph, axes, grid, {x: short}, (2, 2)).clone(y)
    graph.output((y, compressed))
    graph.lint()
    front = R if REGISTERS in segments else 0
    values = [torch.randn(B, length, C, dtype=torch.float64), *(torch.randn(shape, dtype=torch.float64) for shape in inputs)]
    runner = fx.Interpreter(fx.GraphModule({}, graph))
    full, got = runner.run(values[0], sample(values[0], 1, front), *values[1:], torch.empty(H, W))
    return full, got, lambda dim: sample(full, dim, front)


TOKEN_WISE = {
    "heads": (lambda g, x: g(aten.transpose.int, g(aten.view.default, x, [B, x.meta["val"].shape[1], 2, 4]), 1, 2), 2),
    "heads by what remains": (lambda g, x: g(aten.transpose.int, g(aten.view.default, x, [B, x.meta["val"].shape[1], -1, 4]), 1, 2), 2),
    "flattened": (lambda g, x: g(aten.reshape.default, g(aten.unsqueeze.default, x, 2), [B, x.meta["val"].shape[1], C]), 1),
    "expanded": (lambda g, x: g(aten.expand.default, g(aten.unsqueeze.default, x, 1), [B, 3, x.meta["val"].shape[1], C]), 2),
    "expanded as it is": (lambda g, x: g(aten.expand.default, g(aten.unsqueeze.default, x, 1), [-1, 3, -1, -1]), 2),
    "pointwise": (lambda g, x: g(aten.mul.Tensor, g(aten.relu.default, x), 2.0), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TOKEN_WISE)
def test_a_branch_of_sampled_tokens_is_the_sampled_branch(layout, case):
    make, dim = TOKEN_WISE[case]
    full, got, sampled = both(LAYOUTS[layout], make)
    assert full.shape[dim] != got.shape[dim]
    torch.testing.assert_close(got, sampled(dim), atol=0, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", ["tokens, channels", "batch, tokens, channels", "tokens, 1", "channels"])
def test_a_table_by_token_is_sampled_and_another_is_not(layout, by):
    """As RoPE's cosines and sines, or a bias."""
    length = axis_size(LAYOUTS[layout])
    shape = {"tokens, channels": (length, C), "batch, tokens, channels": (B, length, C), "tokens, 1": (length, 1), "channels": (C,)}[by]
    _, got, sampled = both(LAYOUTS[layout], lambda g, x, table: g(aten.mul.Tensor, x, g(aten.cos.default, table)), shape)
    torch.testing.assert_close(got, sampled(1), atol=1e-15, rtol=0)


EDGES = {  # cuts at the image's edges
    "image, text": [(0, N, N), (N, None, None), (N, N + T, None), (0, -T, N), (-T, None, None), (2 + N, None, None)],
    "registers, image, text": [(R, R + N, N), (0, R, None), (R + N, None, None), (2, R, None), (R, None, N + T)],
}


@pytest.mark.parametrize(("layout", "start", "end", "has_image"), [(k, *edges) for k, v in EDGES.items() for edges in v])
def test_cuts_at_the_images_edge_move_with_it(layout, start, end, has_image):
    full, got, _ = both(KNOWN[layout], lambda g, x: g(aten.slice.Tensor, x, 1, start, end))
    torch.testing.assert_close(got, sample(full, 1) if has_image else full, atol=0, rtol=0)


def slice_axis(start, end, step=1):
    return lambda g, x: g(aten.slice.Tensor, x, 1, start, end, step)


def part(target, *args):
    return lambda g, x: g(operator.getitem, g(target, x, *args), 0)


REFUSED = {
    "into the image": (KNOWN, slice_axis(0, N - 1), "slice_tensor cuts through the image tokens"),
    "out of the image": (KNOWN, slice_axis(5, None), "slice_tensor cuts through the image tokens"),
    "behind the image, where text of any length follows": (LAYOUTS, slice_axis(0, N), "at a place that does not follow from the grid"),
    "every second token": (KNOWN, slice_axis(0, None, 2), "takes every 2th of the tokens"),
    "split at the text": (LAYOUTS, part(aten.split_with_sizes.default, [N, T], 1), "split_with_sizes.* cuts through compressed tokens"),
    "split by a size": (LAYOUTS, part(aten.split.Tensor, N, 1), "split.* cuts through compressed tokens"),
    "in halves": (LAYOUTS, part(aten.chunk.default, 2, 1), "chunk.* cuts through compressed tokens"),
    "one of them": (LAYOUTS, lambda g, x: g(aten.select.int, x, 1, 3), "select.* takes one of the image tokens"),
    "one by one": (LAYOUTS, part(aten.unbind.int, 1), "unbind.* cuts through compressed tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_cuts_through_the_image_are_refused(case):
    layouts, make, message = REFUSED[case]
    with pytest.raises(RewriteError, match=message):
        both(layouts["image, text"], make)


@pytest.mark.parametrize("way", [aten.view.default, aten.unflatten.int])
def test_a_grid_made_of_the_tokens_is_refused(way):
    def make(g, x):
        return g(way, x, [B, H, W, C]) if way is aten.view.default else g(way, x, 1, [H, W])

    with pytest.raises(RewriteError, match=r"has the image tokens in several dimensions|cuts through compressed tokens"):
        both(LAYOUTS["image"], make)


def test_channels_may_be_cut():
    _, got, sampled = both(LAYOUTS["image"], part(aten.chunk.default, 2, -1))
    torch.testing.assert_close(got, sampled(1), atol=0, rtol=0)


def test_a_node_used_twice_is_emitted_once_and_the_original_stays():
    def make(g, x):
        up = g(aten.relu.default, x)
        return g(aten.add.Tensor, g(aten.exp.default, up), g(aten.neg.default, up))

    full, got, sampled = both(LAYOUTS["image"], make)
    assert full.shape == (B, N, C)
    torch.testing.assert_close(got, sampled(1), atol=0, rtol=0)


@pytest.mark.parametrize(("layout", "expected"), [("image", (0, 0)), ("image, text", (0, None)), ("registers, image, text", (R, None))])
def test_the_images_place_is_known_by_numbers_only(layout, expected):
    assert image_place(LAYOUTS[layout]) == expected
    assert is_image(LAYOUTS[layout])
    assert not is_image((TEXT_SEGMENT,))
