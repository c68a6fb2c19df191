import itertools

from hypothesis import given
from hypothesis import strategies as st

from edit_compile import TokenKind, TokenLayout
from edit_compile.tokens import concatenated

layouts = st.lists(st.tuples(st.sampled_from(TokenKind), st.integers(1, 9)), max_size=5).map(lambda s: TokenLayout.of(*s))


def test_a_layout_reads_as_its_segments():
    assert str(TokenLayout.of(("image", "h*w"), ("text", "t"))) == "[image h*w, text t]"


@given(layouts, layouts)
def test_joining_keeps_every_segment_in_order(a: TokenLayout, b: TokenLayout):
    assert concatenated([a, b]).segments == a.segments + b.segments


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
