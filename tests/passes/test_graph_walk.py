"""graph_walk: arguments by position, name and type; what lies up, down and between; what dead code is."""

from __future__ import annotations

import pytest
import torch

from edit_compile.passes.graph_walk import (
    argument,
    between,
    downstream,
    module_calls,
    number,
    numbers,
    op_name,
    operand,
    operands,
    optional_operand,
    remove_dead,
    upstream,
)
from edit_compile.torch_internals import ROOT_CALL
from hand_built import Built, aten, targets


def test_arguments_by_position_name_and_default():
    built = Built()
    x, mask = built.input("x", 2, 3), built.input("mask", 3, 3)
    total = built(aten.sum.dim_IntList, x, [0, 1])
    joined = built(aten.cat.default, [x, x], dim=1)
    attention = built(aten.scaled_dot_product_attention.default, *[built.input(n, 2, 1, 3, 4) for n in "qkv"], attn_mask=mask)
    assert (operand(total, 0), numbers(total, 1), number(joined, 1, "dim", 0)) == (x, [0, 1], 1)
    assert (operands(joined, 0), numbers(joined, 1, "dim")) == ([x, x], [1])
    assert (number(total, 5, "keepdim", 7), argument(total, 5, "keepdim")) == (7, None)
    assert (optional_operand(attention, 3, "attn_mask"), optional_operand(attention, 6, "scale")) == (mask, None)


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda node: operand(node, 1), r"argument 1 of sum_dim_int_list is \[0\], not a node"),
        (lambda node: operands(node, 1), r"argument 1 of sum_dim_int_list is \[0\], not a list of nodes"),
        (lambda node: operands(node, 0), "argument 0 of sum_dim_int_list is x, not a list of nodes"),
        (lambda node: number(node, 1), r"argument 1 of sum_dim_int_list is \[0\], not a number"),
        (lambda node: number(node, 4, "keepdim"), "argument 4 of sum_dim_int_list is None, not a number"),
        (lambda node: numbers(node, 0), "argument 0 of sum_dim_int_list is x, not numbers"),
    ],
)
def test_an_argument_of_another_type_is_named(read, words):
    built = Built()
    node = built(aten.sum.dim_IntList, built.input("x", 2, 3), [0])
    with pytest.raises(TypeError, match=words):
        read(node)


def test_names_of_operators():
    built = Built()
    x = built.input("x", 2, 3)
    assert [op_name(built(target, x, -1)) for target in (aten.softmax.int, torch.softmax)] == ["softmax", "softmax"]


def test_up_down_and_between():
    built = Built()
    x, y = built.input("x", 2), built.input("y", 2)
    a = built(aten.relu.default, x)
    b = built(aten.add.Tensor, a, y)
    c = built(aten.neg.default, a)
    graph = built.output(b, c)
    assert list(upstream(b)) == [b, a, y, x]
    assert list(upstream(b, enter=lambda node: node is not a)) == [b, a, y]
    assert downstream({a}, graph) == {a, b, c, graph.output_node()}
    assert between(x, b) == [x, a, b]
    assert between(c, b) == []


def test_calls_of_submodules_begin_below_the_root():
    built = Built()
    x = built.input("x", 2)
    inner = built(aten.relu.default, x, at="blocks.attn")
    assert module_calls(inner) == [("L1", "blocks"), ("L2", "blocks.attn")]
    outside = built(aten.relu.default, x)
    outside.meta["nn_module_stack"] = {"": (ROOT_CALL, torch.nn.Module)}
    assert module_calls(outside) == []


def test_assertions_and_unread_random_numbers_are_dead_and_writes_are_not():
    built = Built()
    x, y = built.input("x", 2), built.input("y", 2)
    built(aten.dropout.default, x, 0.1, True)
    built(aten.rand.default, [2], device="meta")
    built(aten._assert_tensor_metadata.default, x, dtype=torch.float32)
    built(aten.copy_.default, x, y)
    graph = built.output(x)
    remove_dead(graph)
    assert targets(graph) == ["copy_"]
