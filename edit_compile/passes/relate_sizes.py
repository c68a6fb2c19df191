"""Find out what the sizes in a graph are in terms of its inputs' sizes where capture had to take the example's numbers.

The model is captured twice, at the example's sizes and at others. A size that is the same in both is a constant; one that
differs is written as an expression in those dimensions of the inputs that may differ: a fraction of one, a product, a sum.
The graph that comes out has the example's numbers in its operations and symbolic sizes in its tensors' shapes, as a graph
that was captured symbolically: what reads shapes (axes, layouts, grids) need not know the difference. A size that follows from
no input gets a symbol that no input has; grids with one have to be stated.

A model that is captured symbolically may have fixed sizes all the same, because it asks whether they are its default ones. It is
captured at larger ones then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from edit_compile.errors import CaptureError
from edit_compile.passes.axes.algebra import expression, hint
from edit_compile.passes.capture import Capture, capture, meta_copy, meta_inputs
from edit_compile.passes.capture_context import capturing
from edit_compile.passes.graph_walk import shape_of
from edit_compile.torch_internals import SymbolicShapes

Sizes = Mapping[int, int]  # a size of the example's inputs, and what it is in the second capture
_MULTIPLES = ((2, 3, 4, 5, 6, 7, 8, 9), (3, 5, 7, 9, 11, 13, 15, 17))  # by which sizes grow, tried in turn


def capture_model(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Capture, Mapping[str, Any]]:
    """Capture a whole model, all sizes that vary symbolic.

    Returns:
        The capture, and the inputs that are the example now: larger ones where the model does something at the sizes of
        those given that it does at no others, as to take its table of positions as it is.

    Raises:
        CaptureError: it cannot be captured.
    """
    captured = capture(model, inputs)
    fixed = list(_fixed_positions(captured))
    if not captured.fixed and not any(_runs(model, _resized(inputs, {size: 2 * size}), captured.probe) for size in set(fixed)):
        return captured, inputs
    larger = _at_larger_sizes(model, inputs, captured, fixed) if fixed and captured.symbolic else None
    return larger or (relate_sizes(model, inputs, captured, set(fixed)), inputs)


def _at_larger_sizes(
    model: nn.Module, inputs: Mapping[str, Any], captured: Capture, fixed: Sequence[int]
) -> tuple[Capture, Mapping[str, Any]] | None:
    """Capture at sizes of which fewer are fixed; None if there are none."""
    for multiples in _MULTIPLES:
        varying = _varying(model, inputs, captured, multiples)
        if not varying.keys() & set(fixed):
            return None
        resized = _resized(inputs, varying)
        try:
            again = capture(model, resized, probes=(captured.probe,))
        except CaptureError:
            continue
        fewer = again.symbolic and len(list(_fixed_positions(again))) < len(fixed)
        return (again, resized) if fewer else None
    return None


def _fixed_positions(captured: Capture) -> Iterator[int]:
    """Yield the sizes that are numbers where an input has positions.

    These are a picture's or video's last two dimensions, and the last but one of tokens. A video's frames come before or behind its
    channels: if both are numbers, either may be.
    """
    for node in captured.graph.nodes:
        shape = shape_of(node) or ()
        if node.op == "placeholder" and captured.source(node).kind == "input" and len(shape) >= 3:
            frames = shape[1:3] if len(shape) == 5 and all(map(_is_number, shape[1:3])) else ()
            places = shape[-2:] if len(shape) > 3 else shape[-2:-1]
            yield from (hint(size) for size in (*frames, *places) if _is_number(size) and hint(size) > 1)


def _is_number(size: Any) -> bool:
    return expression(size).isdigit()


def relate_sizes(model: nn.Module, inputs: Mapping[str, Any], captured: Capture, fixed: Set[int]) -> Capture:
    """Make the sizes of a graph symbolic that vary though they were captured as numbers.

    Args:
        fixed: the numbers among the sizes of the inputs; where the model takes none of them larger, the graph stays as it is.
    """
    for multiples in _MULTIPLES:
        varying = _varying(model, inputs, captured, multiples)
        if not varying.keys() & fixed:
            return captured
        try:
            first = capture(model, inputs, symbolic=False, probes=(captured.probe,)) if captured.symbolic else captured
            second = capture(model, _resized(inputs, varying), symbolic=False, probes=(captured.probe,))
        except CaptureError:
            continue
        pairs = list(zip(first.graph.nodes, second.graph.nodes, strict=False))
        if len(first.graph.nodes) == len(second.graph.nodes) and all(a.target == b.target for a, b in pairs if a.op == "call_function"):
            return _related(first, varying, pairs)
    first = capture(model, inputs, symbolic=False, probes=(captured.probe,))
    own = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    return _related(first, varying, [(node, None) for node in first.graph.nodes], own)


def _varying(model: nn.Module, inputs: Mapping[str, Any], captured: Capture, multiples: Sequence[int]) -> dict[int, int]:
    """Find the sizes of the inputs that the model takes larger too, one by one; the others are channels, or fixed."""
    tensors = [leaf for leaf in pytree.tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
    sizes = sorted({size for tensor in tensors for size in tensor.shape if size > 1})
    grown = {size: size * multiples[i % len(multiples)] for i, size in enumerate(sizes)}
    found = {size: larger for size, larger in grown.items() if _runs(model, _resized(inputs, {size: larger}), captured.probe)}
    return found if _runs(model, _resized(inputs, found), captured.probe) else {}


def _resized(inputs: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not sizes.keys() & set(value.shape):
            return value
        return torch.empty([sizes.get(size, size) for size in value.shape], dtype=value.dtype, device="meta")

    resized: dict[str, Any] = pytree.tree_map(leaf, dict(inputs))
    return resized


def _runs(model: nn.Module, inputs: dict[str, Any], probe: torch.dtype | None) -> bool:
    with capturing(model), torch.no_grad():
        try:
            meta_copy(model, probe)(**meta_inputs(inputs, probe))
        except Exception:  # whatever a model raises for sizes that it does not take
            return False
    return True


# ------------------------------------------------------------------ from two numbers to an expression


@dataclass
class _Fit:
    """Expressions in the inputs' sizes for sizes that differ between the two captures.

    Attributes:
        inputs: the sizes that vary, each with what it is in the second capture.
        known: the expression for a size, by its numbers in both captures.
    """

    shapes: SymbolicShapes
    inputs: Sizes
    known: dict[tuple[int, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for size, larger in self.inputs.items():
            self.known[size, larger] = self.shapes.symbol(f"size_{size}", size)

    def of(self, first: int, second: int) -> Any:
        """Return a size by its numbers in both captures: a number if they are equal, else an expression or a symbol of its own."""
        if first == second:
            return first
        if (first, second) not in self.known:
            found = self._part(first, second) or self._product(first, second) or self._sum(first, second)
            self.known[first, second] = found if found is not None else self.shapes.symbol(f"unknown_{first}_{second}", first)
        return self.known[first, second]

    def _part(self, first: int, second: int) -> Any:
        for size, larger in self.inputs.items():
            if second * size == first * larger:
                part, symbol = Fraction(first, size), self.known[size, larger]
                whole = symbol if part.numerator == 1 else symbol * part.numerator
                return whole if part.denominator == 1 else whole // part.denominator
        return None

    def _product(self, first: int, second: int) -> Any:
        for (a, b), (c, d) in combinations_with_replacement(list(self.known), 2):
            if a * c == first and b * d == second:
                return self.known[a, b] * self.known[c, d]
        for (a, b), (c, d) in combinations_with_replacement(self.inputs.items(), 2):
            if second * a * c == first * b * d:
                part = Fraction(first, a * c)
                return self.known[a, b] * self.known[c, d] * part.numerator // part.denominator
        return None

    def _sum(self, first: int, second: int) -> Any:
        for (a, b), known in list(self.known.items()):
            if a < first and first - a == second - b:
                return known + (first - a)
            if a < first and (rest := self.known.get((first - a, second - b))) is not None:
                return known + rest
        return None


def _related(first: Capture, varying: Sizes, pairs: Sequence[tuple[fx.Node, fx.Node | None]], constants: set[int] | None = None) -> Capture:
    """Give a graph's tensors symbolic shapes.

    Args:
        pairs: every node and its counterpart in the second capture; without one, sizes that are in `constants` are constants
            and all others follow from nothing.
    """
    with SymbolicShapes() as shapes:
        fit = _Fit(shapes, varying)

        def size(a: int, b: int | None) -> Any:
            if b is None:
                b = a if a in (constants or ()) or a == 1 else varying.get(a, -a)
            return fit.of(hint(a), hint(b))

        def tensor(a: Any, b: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            other = b.shape if isinstance(b, Tensor) and b.ndim == a.ndim else [None] * a.ndim
            return shapes.tensor([size(x, y) for x, y in zip(a.shape, other, strict=True)], a)

        for node, counterpart in pairs:
            value, other = node.meta.get("val"), counterpart.meta.get("val") if counterpart is not None else None
            if isinstance(value, list | tuple):
                others = other if isinstance(other, list | tuple) and len(other) == len(value) else [None] * len(value)
                node.meta["val"] = type(value)(tensor(a, b) for a, b in zip(value, others, strict=True))
            elif isinstance(value, Tensor):
                node.meta["val"] = tensor(value, other)
    return replace(first, fixed=True)
