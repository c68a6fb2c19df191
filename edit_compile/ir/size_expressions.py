"""Size expressions: `s20//2` as data in a plan, and as a function of the sizes of a forward's inputs."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from edit_compile.errors import GridError

MAX_LENGTH = 500  # of an expression in characters: a hand-made plan must not exhaust the parser

Operators = Mapping[type[ast.AST], Callable[..., int]]

OPERATORS: Operators = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}

_MANY_DIVISORS = 2**12 * 3**4 * 5**2 * 7
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37)

Evaluator = Callable[[Mapping[str, int]], int]


def evaluator(expression: str, symbols: set[str], operators: Operators = OPERATORS) -> Evaluator:
    """Compile an arithmetic expression over sizes to a function of them. Nothing but operators, numbers and symbols is accepted.

    Args:
        operators: by their nodes; default: + - * //.

    Raises:
        GridError: anything else is in it, or it is longer than `MAX_LENGTH`.
    """
    if len(expression) > MAX_LENGTH:
        raise GridError(f"a size expression has {len(expression)} characters, more than {MAX_LENGTH}: {expression[:40]}...")
    try:
        return _compiled(ast.parse(expression, mode="eval").body, symbols, operators)
    except (SyntaxError, KeyError, ValueError, RecursionError, MemoryError) as error:
        raise GridError(f"{expression!r} is not a size expression over {sorted(symbols)}: {error}") from None


def symbols_in(expression: str) -> set[str]:
    """List the symbols of an expression; empty if it cannot be parsed."""
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def same_value(a: str, b: str) -> bool:
    """Say whether two expressions have one value for sizes that all usual patches divide; True where either cannot be evaluated."""
    symbols = sorted(symbols_in(a) | symbols_in(b))
    sizes = {symbol: _MANY_DIVISORS * prime for symbol, prime in zip(symbols, _PRIMES, strict=False)}
    try:
        return evaluator(a, set(sizes))(sizes) == evaluator(b, set(sizes))(sizes)
    except (GridError, ZeroDivisionError):
        return True


def _compiled(node: ast.AST, symbols: set[str], operators: Operators) -> Evaluator:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        number = node.value
        return lambda sizes: number
    if isinstance(node, ast.Name) and node.id in symbols:
        name = node.id
        return lambda sizes: sizes[name]
    if isinstance(node, ast.BinOp):
        apply, (left, right) = operators[type(node.op)], (_compiled(side, symbols, operators) for side in (node.left, node.right))
        return lambda sizes: apply(left(sizes), right(sizes))
    if isinstance(node, ast.UnaryOp):
        apply_one, operand = operators[type(node.op)], _compiled(node.operand, symbols, operators)
        return lambda sizes: apply_one(operand(sizes))
    raise KeyError(ast.dump(node))
