"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Write a table; what would end a cell is escaped.

    Args:
        right: the numbers of the columns that are aligned to the right.
    """
    rule = ["---:" if number in right else "---" for number in range(len(head))]
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
