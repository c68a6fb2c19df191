import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_compile import Grid, GridError, TokenKind, TokenLayout
from edit_compile.ir.size_expressions import MAX_LENGTH, evaluator

layouts = st.lists(st.tuples(st.sampled_from(TokenKind), st.integers(1, 9)), max_size=5).map(lambda s: TokenLayout.of(*s))


def test_a_layout_reads_as_its_segments():
    assert str(TokenLayout.of(("image", "h*w"), ("text", "t"))) == "[image h*w, text t]"


@given(layouts, layouts)
def test_joining_keeps_every_segment_in_order(a: TokenLayout, b: TokenLayout):
    assert (a + b).segments == a.segments + b.segments


@given(layouts)
def test_kinds_have_no_equal_neighbours(layout: TokenLayout):
    kinds = layout.kinds
    assert all(a != b for a, b in itertools.pairwise(kinds))
    assert set(kinds) == {s.kind for s in layout.segments}


def test_only_and_has():
    joint = TokenLayout.of(("text", 3), ("image", 4))
    assert joint.has(TokenKind.TEXT)
    assert not joint.only(TokenKind.TEXT)
    assert not TokenLayout(()).only(TokenKind.IMAGE)


def test_a_grid_reads_as_its_sizes():
    assert str(Grid(("s0//2", "7"))) == "s0//2 x 7"


def binary(inner):
    return st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})")


def halved(inner):
    return st.tuples(inner, st.integers(1, 9)).map(lambda p: f"(({p[0]})//{p[1]})")


numbers = st.integers(0, 99).map(str)
expressions = st.recursive(
    numbers | st.sampled_from(["s0", "s31", "height"]), lambda inner: binary(inner) | halved(inner) | inner.map(lambda e: f"(-{e})")
)
sizes = st.fixed_dictionaries({name: st.integers(1, 9999) for name in ("s0", "s31", "height")})


@given(expressions, sizes)
def test_size_expressions_are_pythons_arithmetic(expression: str, values: dict[str, int]):
    assert evaluator(expression, set(values))(values) == eval(expression, {"__builtins__": {}}, values)


@pytest.mark.parametrize(
    "expression",
    [
        "(" * 240 + "s0" + ")" * 240,
        "s1",
        "s0 / 2",
        "s0 ** 2",
        "s0 % 2",
        "f(s0)",
        "s0.real",
        "s0[0]",
        "1.5",
        "True",
        "'a'",
        "s0 if 1 else 2",
        "",
        "s0 +",
    ],
)
def test_whatever_else_an_expression_holds_is_refused(expression: str):
    with pytest.raises(GridError, match="is not a size expression over"):
        evaluator(expression, {"s0"})


def test_a_very_long_expression_is_refused_unread():
    with pytest.raises(GridError, match="a size expression has 1999 characters, more than 500"):
        evaluator("+".join(["1"] * 1000), set())
    assert evaluator("+".join(["1"] * (MAX_LENGTH // 2)), set())({}) == MAX_LENGTH // 2
