"""Attention in one form: a scaled_dot_product_attention node over (batch, heads, tokens, channels).

Attention written by hand, softmax(Q K^T * scale + mask) V, becomes such a node; heads folded into the batch, a dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from edit_compile.passes.graph_walk import argument, number, operand, remove_dead

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
MATMULS = (aten.matmul.default, aten.bmm.default)
_NEUTRAL = (aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.type_as.default)
LOWEST_MASK = -1e4  # what scores are filled with to leave a key out: this, or lower


def canonicalize(graph: fx.Graph) -> int:
    """Rewrite in place; returns how many attentions written by hand were found."""
    remove_dead(graph)  # such as returned attention weights that nobody uses
    found = sum(_rewrite(node) for node in list(graph.nodes) if node.target in SOFTMAXES)
    unfolded = sum(_unfold_heads(node) for node in list(graph.nodes) if node.target is SDPA)
    if found or unfolded:
        remove_dead(graph)
        graph.lint()
    return found


# ------------------------------------------------------------------ attention written by hand


@dataclass(frozen=True)
class _Scores:
    """What enters a softmax: query @ transposed_key * scale, and a mask to add, or one that is true where a key is left out."""

    query: fx.Node
    transposed_key: fx.Node
    scale: float = 1.0
    mask: fx.Node | None = None
    left_out: bool = False


def _rewrite(softmax: fx.Node) -> bool:
    """Replace a softmax and the products around it with one node; says whether it could."""
    if number(softmax, 1, "dim") not in (-1, _value(softmax).ndim - 1):
        return False
    product, scores = _weighted_sum(softmax), _read_scores(softmax.args[0])
    if product is None or scores is None:
        return False
    value = operand(product, 1)
    with softmax.graph.inserting_before(product):
        key = _call(product, aten.transpose.int, scores.transposed_key, -1, -2)
        operands = (_cast(product, scores.query, value), _cast(product, key, value), value, _mask(product, scores))
        attention = softmax.graph.call_function(SDPA, operands, {"scale": scores.scale})
    attention.meta = dict(product.meta)
    product.replace_all_uses_with(attention)
    return True


def _weighted_sum(softmax: fx.Node) -> fx.Node | None:
    """Find the product of weights and values, through casts and dropout; None if the weights have another use."""
    weights = softmax
    while len(weights.users) == 1:
        user = next(iter(weights.users))
        if argument(user, 0, "self") is not weights:
            return None
        if user.target not in _NEUTRAL:
            return user if user.target in MATMULS else None
        weights = user
    return None


def _read_scores(found: fx.node.Argument) -> _Scores | None:
    """Read scores back to their product; None where something other than a scale, then a mask, and casts is in between."""
    if not isinstance(found, fx.Node):
        return None
    if found.target in MATMULS:
        return _Scores(operand(found, 0), operand(found, 1))
    if found.target in _NEUTRAL:
        return _read_scores(found.args[0])
    if found.target is aten.baddbmm.default:
        return _read_baddbmm(found)
    if found.target in (aten.mul.Tensor, aten.div.Tensor):
        return _read_scale(found)
    if found.target is aten.add.Tensor and found.kwargs.get("alpha", 1) == 1:
        scores, mask = found.args
        return _masked(_read_scores(scores), mask) or _masked(_read_scores(mask), scores)
    if found.target is aten.masked_fill.Scalar and _is_lowest(found.args[2]):
        return _masked(_read_scores(found.args[0]), found.args[1], left_out=True)
    return None


def _read_baddbmm(node: fx.Node) -> _Scores | None:
    """Read beta * mask + alpha * (query @ transposed_key)."""
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if beta not in (0, 1) or not isinstance(alpha, int | float):
        return None
    return _Scores(operand(node, 1), operand(node, 2), alpha, operand(node, 0) if beta else None)


def _read_scale(node: fx.Node) -> _Scores | None:
    """Read scores multiplied or divided by a number. A mask that the number would scale too is not read."""
    scores, factor = _read_scores(node.args[0]), node.args[1]
    if scores is None or not isinstance(factor, int | float) or (scores.mask is not None and factor != 1):
        return None
    return replace(scores, scale=scores.scale * factor if node.target is aten.mul.Tensor else scores.scale / factor)


def _masked(scores: _Scores | None, mask: fx.node.Argument, *, left_out: bool = False) -> _Scores | None:
    if scores is None or scores.mask is not None or not isinstance(mask, fx.Node):
        return None
    return replace(scores, mask=mask, left_out=left_out)


def _is_lowest(filler: fx.node.Argument) -> bool:
    return isinstance(filler, int | float) and filler <= LOWEST_MASK


def _mask(at: fx.Node, scores: _Scores) -> fx.Node | None:
    """Make the mask that scaled_dot_product_attention takes: two dimensions or more; booleans are true where a key takes part."""
    mask = scores.mask
    if mask is not None and scores.left_out:
        mask = _call(at, aten.logical_not.default, mask)
    if mask is not None and _value(mask).ndim == 1:
        mask = _call(at, aten.unsqueeze.default, mask, 0)
    return mask


def _cast(at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """Bring a node to the dtype of another: one attention node takes one dtype, however the scores were computed."""
    dtype = _value(like).dtype
    return node if _value(node).dtype is dtype else _call(at, aten.to.dtype, node, dtype)


# ------------------------------------------------------------------ heads folded into the batch


def _unfold_heads(attention: fx.Node) -> bool:
    """Turn (B, N, D) operands into (B, 1, N, D)."""
    if _value(attention).ndim != 3:
        return False
    graph = attention.graph
    with graph.inserting_before(attention):
        unfolded = [
            _call(attention, aten.unsqueeze.default, each, 1) if isinstance(each, fx.Node) and _value(each).ndim == 3 else each
            for each in attention.args[:4]
        ]
        new = graph.call_function(SDPA, (*unfolded, *attention.args[4:]), attention.kwargs)
        new.meta = {**attention.meta, "val": _value(attention).unsqueeze(1)}
        result = _call(attention, aten.squeeze.dim, new, 1)
    attention.replace_all_uses_with(result)
    graph.erase_node(attention)
    return True


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _call(at: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Add a call at the graph's insertion point, with its value, as part of the module of `at`."""
    node = at.graph.call_function(target, args)
    node.meta = {**at.meta, "val": target(*fx.node.map_arg(args, lambda each: each.meta["val"]))}
    return node
