"""What a captured graph takes for granted of sizes of its inputs, and programs made of it do not check: text in a file, held to calls."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor

from edit_compile.errors import GridError
from edit_compile.ir.size_expressions import OPERATORS, Evaluator, evaluator

_OPERATORS = {**OPERATORS, ast.Mod: operator.mod}
_SIZE = re.compile(r"\bx(\d+)_(\d+)\b")


def size_name(number: int, dim: int) -> str:
    """Write the size of a dimension of an input, by the input's number, as conditions do."""
    return f"x{number}_{dim}"


def is_equation(text: str) -> bool:
    """Say whether text equates two expressions of `size_name`s and whole numbers, in which nothing can be called."""
    try:
        _sides(text)
    except GridError:
        return False
    return True


def _sides(text: str) -> tuple[Evaluator, Evaluator]:
    """Compile both sides of an equation.

    Raises:
        GridError: it is none.
    """
    left, _, right = text.partition("==")
    symbols = {found[0] for found in _SIZE.finditer(text)}
    return evaluator(left.strip(), symbols, _OPERATORS), evaluator(right.strip(), symbols, _OPERATORS)


def _equation(text: str) -> str:
    if not is_equation(text):
        raise ValueError("it is no equation of sizes")
    return text


Equation = Annotated[str, AfterValidator(_equation)]


class SizeConditions:
    """Equations of sizes, which tensors can be held to."""

    def __init__(self, equations: Sequence[str]) -> None:
        self._equations = [(each, _sides(_equation(each))) for each in equations]

    def broken(self, tensors: Sequence[Tensor], names: Sequence[str]) -> str | None:
        """Return an equation that does not hold for tensors of these names, in words; None if all do."""
        if not self._equations:
            return None
        sizes = {size_name(number, dim): size for number, tensor in enumerate(tensors) for dim, size in enumerate(tensor.shape)}
        broken = min((text for text, sides in self._equations if not _holds(sides, sizes)), key=len, default=None)
        return broken and _SIZE.sub(lambda found: f"{names[int(found[1])]}.shape[{found[2]}]", broken)


def _holds(sides: tuple[Evaluator, Evaluator], sizes: dict[str, int]) -> bool:
    left, right = sides
    try:
        return left(sizes) == right(sizes)
    except ZeroDivisionError:
        return False
