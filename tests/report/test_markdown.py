"""Tables as Markdown."""

from __future__ import annotations

from edit_compile.report.markdown import markdown_table


def test_what_would_end_a_cell_is_escaped():
    assert markdown_table(("a", "b|c"), [("x | y", "z")], right=[1]) == "| a | b\\|c |\n| --- | ---: |\n| x \\| y | z |"
