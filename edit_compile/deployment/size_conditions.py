"""What a captured graph takes for granted of sizes of its inputs, and programs made of it do not check: text in a file, held to calls."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import Tensor

_ALLOWED = (
    *(ast.Expression, ast.Compare, ast.Eq, ast.BinOp, ast.UnaryOp, ast.Load),
    *(ast.Add, ast.Sub, ast.USub, ast.Mult, ast.FloorDiv, ast.Mod),
)
_SIZE = re.compile(r"\bx(\d+)_(\d+)\b")


def size_name(number: int, dim: int) -> str:
    """Write the size of a dimension of an input, by the input's number, as conditions do."""
    return f"x{number}_{dim}"


def is_equation(text: str) -> bool:
    """Say whether text is a Python expression of `size_name`s and whole numbers, in which nothing can be called."""
    try:
        return all(map(_is_allowed, ast.walk(ast.parse(text, mode="eval"))))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    return isinstance(node, _ALLOWED) or (isinstance(node, ast.Name) and _SIZE.fullmatch(node.id) is not None)


def _equation(text: str) -> str:
    if not is_equation(text):
        raise ValueError("it is no equation of sizes")
    return text


Equation = Annotated[str, AfterValidator(_equation)]


class SizeConditions:
    """Equations of sizes, which tensors can be held to."""

    def __init__(self, equations: Sequence[str]) -> None:
        self._equations = [(each, compile(_equation(each), "<sizes>", "eval")) for each in equations]

    def broken(self, tensors: Sequence[Tensor], names: Sequence[str]) -> str | None:
        """Return an equation that does not hold for tensors of these names, in words; None if all do."""
        if not self._equations:
            return None
        sizes = {size_name(number, dim): size for number, tensor in enumerate(tensors) for dim, size in enumerate(tensor.shape)}
        broken = min((text for text, code in self._equations if not _holds(code, sizes)), key=len, default=None)
        return broken and _SIZE.sub(lambda found: f"{names[int(found[1])]}.shape[{found[2]}]", broken)


def _holds(code: Any, sizes: dict[str, int]) -> bool:
    try:
        return bool(eval(code, {"__builtins__": {}}, sizes))
    except ZeroDivisionError:
        return False
