"""Numbers as people read them."""

from __future__ import annotations

import pytest

from edit_compile.words import counted, two_digits


@pytest.mark.parametrize(
    ("number", "text"), [(0.449, "0.45"), (11.6, "12"), (-247.0, "-250"), (1234.0, "1,200"), (99.7, "100"), (0.0, "0"), (7.0, "7")]
)
def test_two_digits_of_any_size(number, text):
    assert two_digits(number) == text


def test_one_thing_and_several():
    assert [counted(number, "image") for number in (0, 1, 2, 1200)] == ["0 images", "1 image", "2 images", "1,200 images"]
