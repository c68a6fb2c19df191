"""Products of two tensors, whatever they are written as: every dimension gets a name, as in an einsum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edit_compile.passes.einsum import Names, dimension_names
from edit_compile.passes.graph_walk import argument, number, numbers, op_name, operand, operands

aten = torch.ops.aten
MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
BADDBMM = aten.baddbmm.default
_TRANSPOSES = ("transpose", "swapaxes", "swapdims")
_MATRIX_TRANSPOSES = ("mT", "adjoint", "mH")


@dataclass(frozen=True)
class Product:
    """A sum over dimensions that two tensors share.

    Attributes:
        node: the product.
        left, right: its operands; `left_names`, `right_names` name their dimensions.
        names: of the result's dimensions.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_names: Names
    right_names: Names
    names: Names

    @property
    def summed(self) -> Names:
        """Return the dimensions that are summed over."""
        return tuple(name for name in self.left_names if name in self.right_names and name not in self.names)

    def of(self, side: fx.Node) -> Names:
        """Return the names of an operand's dimensions."""
        return self.left_names if side is self.left else self.right_names

    def other(self, side: fx.Node) -> fx.Node:
        """Return the operand that is not this one."""
        return self.right if side is self.left else self.left


def product_of(node: fx.Node) -> Product | None:
    """Read a node as the product of two tensors; None if it is none."""
    if node.target in MATMULS:
        return _matmul(node, operand(node, 0), operand(node, 1))
    if node.target is BADDBMM:
        return _matmul(node, operand(node, 1), operand(node, 2))
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _matmul(node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    a, b = rank(left), rank(right)
    if min(a, b) < 2:
        return None
    lead = tuple(f"{i}" for i in range(max(a, b) - 2))
    return Product(node, left, right, (*lead[len(lead) - a + 2 :], "i", "d"), (*lead[len(lead) - b + 2 :], "d", "j"), (*lead, "i", "j"))


def _einsum(node: fx.Node) -> Product | None:
    given = operands(node, 1)
    if len(given) != 2:
        return None
    (left, right), names = dimension_names(str(node.args[0]), list(map(rank, given)))
    if any(len(set(each)) < len(each) for each in (left, right, names)):
        return None
    return Product(node, given[0], given[1], left, right, names)


def rank(node: fx.Node) -> int:
    """Count the dimensions of a node's tensor."""
    value: Tensor = node.meta["val"]
    return value.ndim


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Return which dimension of its source each dimension of a node is, if the node does nothing but reorder them; else None."""
    name = op_name(node)
    dims = list(range(rank(node))) if isinstance(node.meta.get("val"), Tensor) else []
    if name == "permute":
        return tuple(dim % len(dims) for dim in numbers(node, 1, "dims"))
    if name in _TRANSPOSES and len(node.args) > 2:
        a, b = number(node, 1) % len(dims), number(node, 2) % len(dims)
        dims[a], dims[b] = dims[b], dims[a]
        return tuple(dims)
    if name in _MATRIX_TRANSPOSES and not node.meta["val"].is_complex():
        return (*dims[:-2], dims[-1], dims[-2])
    if name in ("movedim", "moveaxis"):
        return _moved(len(dims), numbers(node, 1, "source"), numbers(node, 2, "destination"))
    return None


def _moved(rank: int, sources: Sequence[int], targets: Sequence[int]) -> tuple[int, ...]:
    moved = {target % rank: source % rank for source, target in zip(sources, targets, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in moved.values())
    return tuple(moved[dim] if dim in moved else next(rest) for dim in range(rank))


def keeps_dim(node: fx.Node, index: int) -> bool:
    """Say whether a reduction keeps the reduced dimension as one of size 1."""
    return bool(argument(node, index, "keepdim", False))
