"""What enters a softmax, read back to its product of queries and keys: softmax(scale * factors * (Q K^T) + masks).

Every dimension has a name, so that heads, queries and keys may stand in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from edit_compile.passes.axes.algebra import hint
from edit_compile.passes.einsum import Names
from edit_compile.passes.graph_walk import argument, op_name, operand
from edit_compile.passes.products import BADDBMM, Product, permutation, product_of, rank
from edit_compile.passes.writes import is_written

aten = torch.ops.aten
LOWEST_MASK = -1e4  # what scores are filled with to leave a key out: this, or lower
NEUTRAL = frozenset("dropout alpha_dropout feature_dropout to _to_copy contiguous clone type_as alias detach".split())  # noqa: SIM905
_RESHAPES = ("view", "reshape", "_unsafe_view", "unflatten", "flatten", "_reshape_alias")
_INSERTS = ("unsqueeze", "squeeze")

MaskForm = Literal["added", "left_out", "taken"]  # numbers to add; true where a key is left out; true where it takes part


class NotRead(Exception):
    """Something stands between a product and the softmax that is not understood: says what, for users."""


@dataclass(frozen=True)
class Placed:
    """A tensor that joins the scores, with the names of its dimensions."""

    node: fx.Node
    names: Names
    form: MaskForm = "added"
    factor: float = 1.0
    inverse: bool = False

    def has(self, name: str) -> bool:
        """Say whether the tensor differs along a dimension."""
        return name in self.names and hint(self.node.meta["val"].shape[self.names.index(name)]) != 1


@dataclass(frozen=True)
class Scores:
    """A product, what scales it and what is added, as far as one node of the graph.

    Attributes:
        names: of that node's dimensions.
        scale: a number; `symbolic_scale` is one that is computed from sizes.
        factors: tensors that multiply it.
        masks: tensors that are added, or leave keys out.
        composed: dimensions that a reshape merges from two others or takes apart into them: their names, and the second's size.
    """

    names: Names
    product: Product
    scale: float = 1.0
    symbolic_scale: fx.Node | None = None
    factors: tuple[Placed, ...] = ()
    masks: tuple[Placed, ...] = ()
    composed: Mapping[str, tuple[str, str, Any]] = field(default_factory=dict)

    def placed(self, node: fx.Node, **more: Any) -> Placed:
        """Name a tensor's dimensions where it joins: from the right."""
        dims = rank(node)
        if dims > len(self.names):
            raise NotRead(f"its scores are broadcast against {node.name}, which has more dimensions")
        return Placed(node, self.names[len(self.names) - dims :], **more)


def read_scores(found: Any) -> Scores:
    """Read scores back to their product.

    Raises:
        NotRead: there is none, or something else than scales, masks, casts and reordered dimensions is in between.
    """
    if not isinstance(found, fx.Node) or not isinstance(found.meta.get("val"), Tensor):
        raise NotRead("its scores are no product of queries and keys")
    if is_written(found):
        raise NotRead("a part of its scores is written anew before the softmax")
    product = product_of(found)
    if product is not None:
        return _read_product(found, product)
    name = op_name(found)
    if name in NEUTRAL:
        return read_scores(found.args[0])
    if (order := permutation(found)) is not None:
        inner = read_scores(found.args[0])
        return replace(inner, names=tuple(inner.names[dim] for dim in order))
    reader = _READERS.get(name)
    if reader is None:
        raise NotRead(_unknown(found))
    return reader(found)


def _read_product(node: fx.Node, product: Product) -> Scores:
    scores = Scores(product.names, product)
    if node.target is not BADDBMM:
        return scores
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        raise NotRead("its scores are added to a mask with weights that depend on sizes")
    masks = (scores.placed(operand(node, 0), factor=float(beta)),) if beta else ()
    return replace(scores, scale=float(alpha), masks=masks)


def _unknown(node: fx.Node) -> str:
    name = op_name(node).rstrip("_")
    if name in ("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm", "group_norm"):
        return f"its scores go through {name} before the softmax, which mixes heads or keys (talking heads)"
    return f"its scores go through {name} before the softmax: not the softmax of a scaled product"


# ------------------------------------------------------------------ scales


def _read_scaled(node: fx.Node) -> Scores:
    """Read a product or quotient of scores and a number, or a tensor."""
    inverse = op_name(node) == "div"
    if inverse and argument(node, 9, "rounding_mode") is not None:
        raise NotRead(_unknown(node))
    (scores, factor) = _scores_and_other(node, ordered=inverse)
    if isinstance(factor, int | float):
        return scaled(scores, 1 / factor if inverse else float(factor))
    if not isinstance(factor, fx.Node):
        raise NotRead(_unknown(node))
    if not isinstance(factor.meta.get("val"), Tensor):
        return _scaled_by_size(scores, factor, inverse)
    if any(mask.form == "added" for mask in scores.masks):
        raise NotRead(f"its scores are scaled by {factor.name} after a mask was added")
    return replace(scores, factors=(*scores.factors, scores.placed(factor, inverse=inverse)))


def scaled(scores: Scores, factor: float) -> Scores:
    """Multiply scores, and what was added to them, by a number."""
    if factor <= 0 and scores.masks:
        raise NotRead("its masked scores change their sign")
    masks = tuple(replace(mask, factor=mask.factor * factor) if mask.form == "added" else mask for mask in scores.masks)
    return replace(scores, scale=scores.scale * factor, masks=masks)


def _scaled_by_size(scores: Scores, factor: fx.Node, inverse: bool) -> Scores:
    if inverse or scores.symbolic_scale is not None or any(mask.form == "added" for mask in scores.masks):
        raise NotRead("its scores are scaled by a number that depends on the sizes of the inputs")
    return replace(scores, symbolic_scale=factor)


def _scores_and_other(node: fx.Node, *, ordered: bool = False) -> tuple[Scores, Any]:
    """Find which of two operands is the scores; the first wins."""
    first, second = node.args[0], node.args[1]
    try:
        return read_scores(first), second
    except NotRead as reason:
        if ordered or not isinstance(second, fx.Node) or not isinstance(second.meta.get("val"), Tensor):
            raise
        try:
            return read_scores(second), first
        except NotRead:
            raise reason from None


# ------------------------------------------------------------------ masks


def _read_added(node: fx.Node) -> Scores:
    """Read a sum or difference of scores and a mask, a bias or what is the same for a whole row."""
    negative, alpha = op_name(node) == "sub", argument(node, 9, "alpha", 1)
    if not isinstance(alpha, int | float):
        raise NotRead("its scores are added to a mask with a weight that depends on sizes")
    scores, mask = _scores_and_other(node, ordered=negative)
    if not isinstance(mask, fx.Node) or not isinstance(mask.meta.get("val"), Tensor):
        return scores  # one number for all
    if mask is node.args[0] and alpha != 1:
        raise NotRead("its scores are weighted against a mask")
    return replace(scores, masks=(*scores.masks, scores.placed(mask, factor=-float(alpha) if negative else float(alpha))))


def _read_filled(node: fx.Node) -> Scores:
    """Read masked_fill of scores."""
    scores, mask = read_scores(node.args[0]), operand(node, 1)
    _require_lowest(node.args[2])
    return replace(scores, masks=(*scores.masks, scores.placed(mask, form="left_out")))


def _read_where(node: fx.Node) -> Scores:
    """Read where(mask, scores, lowest) and where(mask, lowest, scores)."""
    condition, first, second = operand(node, 0), node.args[1], node.args[2]
    taken = constant(second) is not None
    _require_lowest(second if taken else first)
    scores = read_scores(first if taken else second)
    return replace(scores, masks=(*scores.masks, scores.placed(condition, form="taken" if taken else "left_out")))


def _require_lowest(filler: Any) -> None:
    value = constant(filler)
    if value is None or value > LOWEST_MASK:
        raise NotRead(f"its masked scores are filled with {value if value is not None else 'what is computed'}, not with a lowest value")


def constant(found: Any) -> float | None:
    """Return the number that an argument is, or that a tensor was filled with; None if it is no constant."""
    if isinstance(found, int | float):
        return float(found)
    if not isinstance(found, fx.Node):
        return None
    name = op_name(found)
    if name in ("full", "full_like", "new_full"):
        return constant(found.args[2 if name == "new_full" else 1])
    if name in ("scalar_tensor", "lift_fresh_copy", "to", "_to_copy", "type_as", "expand", "clone", "neg"):
        inner = constant(found.args[0])
        return -inner if inner is not None and name == "neg" else inner
    return 0.0 if name.startswith(("zeros", "new_zeros")) else 1.0 if name.startswith(("ones", "new_ones")) else None


# ------------------------------------------------------------------ reshapes of the dimensions before queries and keys


def _read_reshaped(node: fx.Node) -> Scores:
    """Read a reshape that merges two dimensions, as batch and heads, or takes them apart."""
    scores = read_scores(node.args[0])
    names, composed = regroup(node, scores.names, scores.composed)
    return replace(scores, names=names, composed=composed)


def regroup(node: fx.Node, names: Names, composed: Mapping[str, tuple[str, str, Any]]) -> tuple[Names, Mapping[str, tuple[str, str, Any]]]:
    """Name the dimensions after a reshape that splits one dimension in two, or merges two neighbours.

    Raises:
        NotRead: it does something else.
    """
    before, after = tuple(operand(node, 0).meta["val"].shape), tuple(node.meta["val"].shape)
    at = next((dim for dim, (a, b) in enumerate(zip(before, after, strict=False)) if not _same(a, b)), min(len(before), len(after)) - 1)
    grown = len(after) - len(before)
    tails = (before[at + 1 + max(0, -grown) :], after[at + 1 + max(0, grown) :])
    if abs(grown) > 1 or (grown == 0 and before != after) or not all(map(_same, *tails)):
        raise NotRead(f"its scores are reshaped ({node.name})")
    if grown == 1:
        known = composed.get(names[at])
        first, second, _ = known or (f"{names[at]}'", f"{names[at]}''", None)
        return (*names[:at], first, second, *names[at + 1 :]), {**composed, names[at]: (first, second, after[at + 1])}
    if grown == -1:
        pair = names[at : at + 2]
        merged = next((name for name, parts in composed.items() if parts[:2] == pair), "*".join(pair))
        return (*names[:at], merged, *names[at + 2 :]), {**composed, merged: (*pair, before[at + 1])}
    return names, composed


def _same(a: Any, b: Any) -> bool:
    return str(a) == str(b) and hint(a) == hint(b)


def _read_inserted(node: fx.Node) -> Scores:
    """Read a dimension of size 1 that comes or goes."""
    scores = read_scores(node.args[0])
    dim = argument(node, 1, "dim")
    if not isinstance(dim, int):
        raise NotRead(f"its scores are reshaped ({node.name})")
    if op_name(node) == "unsqueeze":
        dim %= rank(node)
        return replace(scores, names=(*scores.names[:dim], f"1@{node.name}", *scores.names[dim:]))
    dim %= len(scores.names)
    gone = rank(node) < len(scores.names)
    return replace(scores, names=(*scores.names[:dim], *scores.names[dim + 1 :])) if gone else scores


_READERS: dict[str, Callable[[fx.Node], Scores]] = {
    "mul": _read_scaled,
    "div": _read_scaled,
    "add": _read_added,
    "sub": _read_added,
    "masked_fill": _read_filled,
    "where": _read_where,
    **dict.fromkeys(_RESHAPES, _read_reshaped),
    **dict.fromkeys(_INSERTS, _read_inserted),
}
