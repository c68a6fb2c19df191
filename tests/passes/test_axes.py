"""axes: what a dimension is said to be made of, against what torch really does to positions.

Every element of an input is labelled with its own place. After real operations on the labels it shows which input
dimensions an output dimension runs over; `flow_axes` must name them all.
"""

from __future__ import annotations

import itertools
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_compile.passes.axes.algebra import AxisSegment, axis_size, new_axis, reshape_axes, slice_axis
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.graph_walk import shape_of
from hand_built import Built, aten, run

sizes = st.sampled_from([1, 2, 3, 4, 6])
shapes = st.lists(sizes, min_size=1, max_size=4)


def named(node):
    """Seeds every input dimension with a source of its own: x0, x1, ... for x; parameters have none."""
    if node.name in ("order", "w"):
        return None
    return tuple(new_axis(size, f"{node.name}{d}") for d, size in enumerate(shape_of(node)))


def axes_of(graph):
    found = flow_axes(graph, named)
    return [found[n] for n in graph.output_node().all_input_nodes]


def coordinates(shape, dim):
    """A tensor that holds, at every place, that place's coordinate along `dim`."""
    line = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
    return line.expand(shape).contiguous()


def runs_over(graph, dim, start, stop):
    """The input dimensions whose coordinate changes as the output's place changes along `dim` within start..stop."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for placeholder, d in ((p, d) for p in placeholders for d in range(len(shape_of(p)))):
        labels = [coordinates(shape_of(p), d) if p is placeholder else torch.full(shape_of(p), -1) for p in placeholders]
        (places,) = run(graph, *labels)
        part = places.narrow(dim, start, stop - start)
        own = (part >= 0).all()  # beside another input's labels nothing is comparable
        if own and (part != part.narrow(dim, 0, 1)).any():
            yield f"{placeholder.name}{d}"


def check(graph):
    (axes,) = axes_of(graph)
    shape = shape_of(graph.output_node().args[0][0])
    assert [axis_size(axis) for axis in axes] == list(shape)
    for dim, axis in enumerate(axes):
        start = 0
        for segment in axis:
            assert set(runs_over(graph, dim, start, start + segment.size)) <= segment.all_sources
            start += segment.size
    return axes


def factorisations(draw, number):
    """A shape of this many elements, with ones in it."""
    shape, left = [], number
    while left > 1:
        shape.append(draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0])))
        left //= shape[-1]
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return shape or [1]


def moved(draw, built, x):
    """The node after one operation that moves elements."""
    shape = list(shape_of(x))
    dim = draw(st.integers(0, len(shape) - 1))
    kind = draw(st.sampled_from(["reshape", "reshape", "permute", "slice", "cat", "unsqueeze", "flip"]))
    if kind == "reshape":
        return built(aten.reshape.default, x, factorisations(draw, math.prod(shape)))
    if kind == "permute":
        return built(aten.permute.default, x, draw(st.permutations(range(len(shape)))))
    if kind == "slice":
        start = draw(st.integers(0, shape[dim] - 1))
        return built(aten.slice.Tensor, x, dim, start, draw(st.integers(start + 1, shape[dim])), draw(st.integers(1, 2)))
    if kind == "flip":
        return built(aten.flip.default, x, [dim])
    if kind == "unsqueeze":
        return built(aten.unsqueeze.default, x, dim)
    return built(aten.cat.default, [x, x] if draw(st.booleans()) else [x], dim)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_every_dimension_an_axis_runs_over_is_named(data):
    built = Built(torch.int64)
    x = built.input("x", *data.draw(shapes))
    for _ in range(data.draw(st.integers(1, 4))):
        x = moved(data.draw, built, x)
    check(built.output(x))


@given(shapes.filter(lambda s: len(s) > 1), st.data())
@settings(max_examples=60, deadline=None)
def test_joined_inputs_stay_apart_until_they_are_entangled(shape, data):
    built = Built(torch.int64)
    dim = data.draw(st.integers(0, len(shape) - 1))
    other = [data.draw(sizes) if d == dim else s for d, s in enumerate(shape)]
    parts = [built.input("x", *shape), built.input("y", *other)]
    order = data.draw(st.permutations(parts))
    x = built(aten.cat.default, order, dim)
    (axes,) = axes_of(built.output(x))
    assert [segment.sources for segment in axes[dim]] == [{f"{part.name}{dim}"} for part in order]
    assert all({s[0] for s in axis[0].sources} == {"x", "y"} for d, axis in enumerate(axes) if d != dim)


@given(shapes, st.data())
@settings(max_examples=60, deadline=None)
def test_merged_dimensions_keep_their_order(shape, data):
    """Merging after a permutation: the factors are the dimensions in row-major order, so a grid reads as (h, w)."""
    order = data.draw(st.permutations(range(len(shape))))
    built = Built()
    x = built(aten.permute.default, built.input("x", *shape), order)
    (axes,) = axes_of(built.output(built(aten.reshape.default, x, [math.prod(shape)])))
    wide = [d for d in order if shape[d] > 1]
    if len(wide) > 1:
        assert [factor[0].sources for factor in axes[0][0].composed_of] == [{f"x{d}"} for d in wide]
    else:
        assert axes[0][0].all_sources >= {f"x{d}" for d in wide}


@given(shapes, st.data())
@settings(max_examples=60, deadline=None)
def test_a_reshape_and_back_is_the_identity_where_dimensions_only_merge(shape, data):
    axes = tuple(new_axis(size, f"x{d}") for d, size in enumerate(shape))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(shape)))) | {0, len(shape)})
    merged = [math.prod(shape[a:b]) for a, b in itertools.pairwise(cuts)]
    again = reshape_axes(reshape_axes(axes, merged), shape)
    assert [a for a, s in zip(again, shape, strict=True) if s > 1] == [a for a, s in zip(axes, shape, strict=True) if s > 1]


def test_a_reshape_of_nothing():
    assert [axis_size(a) for a in reshape_axes((new_axis(2, "x0"), new_axis(0, "x1"), new_axis(3, "x2")), [0])] == [0]
    assert [axis_size(a) for a in reshape_axes((new_axis(0, "x0"),), [4, 0, 2])] == [4, 0, 2]


segments = st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["image", "text", ""])), min_size=1, max_size=4)


@given(segments, st.data())
@settings(max_examples=100, deadline=None)
def test_cutting_agrees_with_cutting_the_positions(parts, data):
    axis = tuple(AxisSegment(size, f"s{i}", frozenset({source} - {""})) for i, (size, source) in enumerate(parts))
    positions = [source for size, source in parts for _ in range(size)]
    start, stop = sorted((data.draw(st.integers(0, len(positions))), data.draw(st.integers(0, len(positions)))))
    result = slice_axis(axis, start, stop, stop - start)
    assert [next(iter(p.sources), "") for p in result for _ in range(p.size)] == positions[start:stop]


def test_a_segment_cut_through_has_a_known_length_only_if_all_are_numbers():
    """A length seen in the example is not a constant: the number of text tokens changes from call to call."""
    axis = (
        AxisSegment(4, "4", frozenset({"registers"})),
        AxisSegment(7, "t", frozenset({"text"})),
        AxisSegment(6, "h*w", frozenset({"image"})),
    )
    text = slice_axis(axis, 6, 17, 11)[0]
    assert text.size == 5
    assert not text.expr.isdigit()
    numbers = slice_axis((AxisSegment(4, "4"), AxisSegment(6, "6")), 1, 10, 9)
    assert [p.expr for p in numbers] == ["3", "6"]


RESAMPLED = {
    "pixel_unshuffle": lambda g, x: g(aten.pixel_unshuffle.default, x, 2),
    "pixel_shuffle": lambda g, x: g(aten.pixel_shuffle.default, x, 2),
    "conv_transpose2d": lambda g, x: g(aten.conv_transpose2d.input, x, g.parameter("w", 4, 3, 2, 2), None, [2, 2]),
    "avg_pool2d": lambda g, x: g(aten.avg_pool2d.default, x, [2, 2]),
    "max_pool2d": lambda g, x: g(aten.max_pool2d.default, x, [2, 2]),
    "nearest": lambda g, x: g(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0]),
    "bilinear": lambda g, x: g(aten.upsample_bilinear2d.vec, x, None, False, [2.0, 2.0]),
    "pad": lambda g, x: g(aten.pad.default, x, [1, 1, 2, 2]),
    "conv2d": lambda g, x: g(aten.conv2d.default, x, g.parameter("w", 5, 4, 3, 3), None, [2, 2]),
}


@pytest.mark.parametrize("way", RESAMPLED)
def test_resampled_images_stay_images(way):
    built = Built()
    (axes,) = axes_of(built.output(RESAMPLED[way](built, built.input("x", 2, 4, 6, 10))))
    assert [axis[0].all_sources for axis in axes[2:]] == [{"x2"}, {"x3"}]


def test_patches_by_unfold_stay_images():
    built = Built()
    x = built.input("x", 2, 4, 6, 10)
    tokens = built(aten.im2col.default, x, [2, 2], [1, 1], [0, 0], [2, 2])
    windows = built(aten.unfold.default, built(aten.unfold.default, x, 2, 2, 2), 3, 2, 2)
    flat, split = axes_of(built.output(tokens, windows))
    assert flat[2][0].all_sources == {"x2", "x3"}
    assert [axis[0].all_sources for axis in split] == [{"x0"}, {"x1"}, {"x2"}, {"x3"}, {"x2"}, {"x3"}]


REORDERED = {
    "roll": lambda g, x: g(aten.roll.default, x, [1], [1]),
    "flip": lambda g, x: g(aten.flip.default, x, [1]),
    "index_select": lambda g, x: g(aten.index_select.default, x, 1, g.parameter("order", 12)),
    "index": lambda g, x: g(aten.index.Tensor, x, [None, g.parameter("order", 12)]),
    "gather": lambda g, x: g(aten.gather.default, x, 1, g.parameter("order", 2, 12, 5)),
}


@pytest.mark.parametrize("way", REORDERED)
def test_reordered_tokens_are_still_the_images_but_have_no_grid(way):
    built = Built(torch.int64)
    x = built.input("x", 2, 3, 4, 5)
    (axes,) = axes_of(built.output(REORDERED[way](built, built(aten.reshape.default, x, [2, 12, 5]))))
    assert axes[1][0].all_sources == {"x1", "x2"}
    assert not axes[1][0].composed_of
    assert axes[2][0].sources == {"x3"}


def test_a_roll_without_dimensions_rolls_the_flattened_tensor():
    built = Built()
    (axes,) = axes_of(built.output(built(aten.roll.default, built.input("x", 2, 3), [1])))
    assert [axis[0].all_sources for axis in axes] == [{"x0", "x1"}, {"x0", "x1"}]


def test_a_submodule_is_not_read_by_its_name():
    """A submodule's path may be an operator's name."""
    built = Built()
    x = built.input("x", 2, 3, 5)
    call = built.graph.call_module("transpose", (x,))
    call.meta["val"] = x.meta["val"].new_empty(2, 3, 7)
    (axes,) = axes_of(built.output(call))
    assert [axis[0].sources for axis in axes] == [{"x0"}, {"x1"}, frozenset()]


def test_products():
    built = Built()
    a, b, bias = built.input("a", 2, 3, 5), built.input("b", 2, 5, 4), built.input("bias", 2, 3, 4)
    square = built.input("s", 2, 6, 6)
    graph = built.output(built(aten.matmul.default, a, b), built(aten.baddbmm.default, bias, a, b), built(aten.bmm.default, square, square))
    product, added, squared = axes_of(graph)
    assert [axis[0].sources for axis in product[1:]] == [{"a1"}, {"b2"}]
    assert [axis[0].sources for axis in added[1:]] == [{"a1"}, {"b2"}]
    assert [axis[0].sources for axis in squared[1:]] == [{"s1"}, {"s2"}]


def test_broadcasting_finds_the_dimension_that_has_the_size():
    built = Built()
    x, scale = built.input("x", 2, 3, 5), built.input("scale", 2, 1, 5)
    (axes,) = axes_of(built.output(built(aten.mul.Tensor, x, scale)))
    assert [axis[0].sources for axis in axes] == [{"x0", "scale0"}, {"x1"}, {"x2", "scale2"}]


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.mean.dim, ([1],), ["x0", "x2"]),
        (aten.mean.dim, ([1], True), ["x0", None, "x2"]),
        (aten.select.int, (1, 0), ["x0", "x2"]),
        (aten.transpose.int, (1, -1), ["x0", "x2", "x1"]),
        (aten.mT.default, (), ["x0", "x2", "x1"]),
        (aten.movedim.int, (0, -1), ["x1", "x2", "x0"]),
        (aten.moveaxis.intlist, ([2, 0], [0, 1]), ["x2", "x0", "x1"]),
        (aten.unsqueeze.default, (-1,), ["x0", "x1", "x2", None]),
        (aten.expand.default, ([7, -1, -1, -1],), [None, "x0", "x1", "x2"]),
    ],
    ids=["mean", "mean keepdim", "select", "transpose", "mT", "movedim", "moveaxis", "unsqueeze", "expand"],
)
def test_dimensions_that_go_come_and_move(target, args, expected):
    built = Built()
    (axes,) = axes_of(built.output(built(target, built.input("x", 2, 3, 5), *args)))
    assert [next(iter(axis[0].sources), None) for axis in axes] == expected


def test_stacking_puts_a_new_dimension_between_those_in_common():
    built = Built()
    (axes,) = axes_of(built.output(built(aten.stack.default, [built.input("x", 2, 3, 5), built.input("y", 2, 3, 5)], -1)))
    assert [axis[0].sources for axis in axes] == [{"x0", "y0"}, {"x1", "y1"}, {"x2", "y2"}, frozenset()]


@pytest.mark.parametrize("target", [aten.chunk.default, aten.split.Tensor])
def test_parts_start_where_the_ones_before_end(target):
    built = Built()
    joint = built(aten.cat.default, [built.input("x", 2, 4, 3), built.input("y", 2, 4, 3)], 1)
    parts = built(target, joint, 2 if target is aten.chunk.default else 4, 1)
    first, second = (built(operator.getitem, parts, i) for i in range(2))
    (a, b) = axes_of(built.output(first, second))
    assert (a[1][0].sources, b[1][0].sources) == ({"x1"}, {"y1"})
