"""Equations of einsum: a name for every dimension of the operands and of the result."""

from __future__ import annotations

from collections.abc import Sequence

Names = tuple[str, ...]  # of a tensor's dimensions


def dimension_names(equation: str, ranks: Sequence[int]) -> tuple[list[Names], Names]:
    """Name the operands' dimensions, and those of the result: by letters, those of an ellipsis by their places from the right.

    Without an arrow the result has the ellipsis, then what occurs once, by the alphabet.

    Args:
        ranks: the numbers of dimensions of the operands.

    Raises:
        ValueError: the equation is for another number of operands.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    listed = [_spelled_out(term, rank) for term, rank in zip(inputs.split(","), ranks, strict=True)]
    every = [name for names in listed for name in names]
    dots = max(([name for name in names if name.startswith("...")] for names in listed), key=len)
    if arrow:
        front, _, back = result.partition("...")
        return listed, (*front, *(dots if "..." in result else ()), *back)
    return listed, (*dots, *sorted(name for name in set(every) - set(dots) if every.count(name) == 1))


def _spelled_out(term: str, rank: int) -> Names:
    front, dots, back = term.partition("...")
    covered = rank - len(front) - len(back) if dots else 0
    return (*front, *(f"...{from_right}" for from_right in range(covered, 0, -1)), *back)
