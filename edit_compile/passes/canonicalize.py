"""Attention in one form: a scaled_dot_product_attention node over (batch, heads, tokens, channels).

Attention written by hand, softmax(Q K^T * scale + mask) V, becomes such a node; heads folded into the batch, a dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_ADDED_PRODUCT = aten.baddbmm.default
_NEUTRAL = (aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.type_as.default)
LOWEST_MASK = -1e4  # what scores are filled with to leave a key out: this, or lower


def canonicalize(graph: fx.Graph) -> int:
    """Rewrite in place; returns how many attentions written by hand were found."""
    _remove_dead(graph)  # such as returned attention weights that nobody uses
    found = sum(_rewrite(node) for node in list(graph.nodes) if node.target in SOFTMAXES)
    folded = sum(_unfold_heads(node) for node in list(graph.nodes) if node.target is SDPA)
    if found or folded:
        _remove_dead(graph)
        graph.lint()
    return found


def _remove_dead(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() and node.target is not aten.dropout.default)


def _rewrite(softmax: fx.Node) -> bool:
    rank = softmax.meta["val"].ndim
    if softmax.args[1] not in (-1, rank - 1):
        return False
    product = _only_user(softmax)
    while product is not None and product.target in _NEUTRAL:
        product = _only_user(product)
    if product is None or product.target not in _PRODUCTS or not _descends(product.args[0], softmax):
        return False
    graph = softmax.graph
    with graph.inserting_before(product):
        scores = _scores(softmax.args[0])
        if scores is None:
            return False
        product_of_scores, scale, mask = scores
        query, transposed = product_of_scores.args[-2:]
        value = product.args[1]
        key = _call(product, aten.transpose.int, transposed, -1, -2)
        if mask is not None and _rank(mask) == 1:
            mask = _call(product, aten.unsqueeze.default, mask, 0)
        operands = (_cast(product, query, value), _cast(product, key, value), value, mask)
        attention = graph.call_function(SDPA, operands, {"scale": scale})
    attention.meta = dict(product.meta)
    product.replace_all_uses_with(attention)
    return True


def _scores(node: fx.node.Argument) -> tuple[fx.Node, float, fx.Node | None] | None:
    """Q K^T behind a scale, a mask and casts; None where something else is between."""
    scale, mask = 1.0, None
    while isinstance(node, fx.Node) and node.target not in (*_PRODUCTS, _ADDED_PRODUCT):
        if node.target in _NEUTRAL:
            node = node.args[0]
        elif node.target is aten.mul.Tensor and isinstance(node.args[1], int | float):
            node, scale = node.args[0], scale * node.args[1]
        elif node.target is aten.div.Tensor and isinstance(node.args[1], int | float):
            node, scale = node.args[0], scale / node.args[1]
        elif mask is None and scale == 1.0 and _adds(node):
            return next((found for scores, mask in (node.args, node.args[::-1]) if (found := _with_mask(scores, mask))), None)
        elif mask is None and scale == 1.0 and node.target is aten.masked_fill.Scalar and node.args[2] <= LOWEST_MASK:
            return _with_mask(node.args[0], node.args[1], filled=True)
        else:
            return None
    if not isinstance(node, fx.Node) or node.target is not _ADDED_PRODUCT:
        return (node, scale, mask) if isinstance(node, fx.Node) else None
    weight = node.kwargs.get("beta", 1)
    if weight == 0:
        return node, scale * node.kwargs.get("alpha", 1), mask
    return (node, node.kwargs.get("alpha", 1), node.args[0]) if (weight, scale, mask) == (1, 1.0, None) else None


def _adds(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1 and all(isinstance(a, fx.Node) for a in node.args)


def _with_mask(scores: fx.node.Argument, mask: fx.Node, *, filled: bool = False) -> tuple[fx.Node, float, fx.Node | None] | None:
    found = _scores(scores)
    if found is None or found[2] is not None:
        return None
    if filled:
        mask = _call(mask, aten.logical_not.default, mask, after=True)
    return found[0], found[1], mask


def _unfold_heads(attention: fx.Node) -> bool:
    """(B, N, D) operands become (B, 1, N, D)."""
    if attention.meta["val"].ndim != 3:
        return False
    graph = attention.graph
    with graph.inserting_before(attention):
        unfolded = [_call(attention, aten.unsqueeze.default, n, 1) if _rank(n) == 3 else n for n in attention.args[:4]]
        new = graph.call_function(SDPA, (*unfolded, *attention.args[4:]), attention.kwargs)
        new.meta = {**attention.meta, "val": attention.meta["val"].unsqueeze(1)}
        result = _call(attention, aten.squeeze.dim, new, 1)
    attention.replace_all_uses_with(result)
    graph.erase_node(attention)
    return True


def _rank(node: fx.node.Argument) -> int:
    return node.meta["val"].ndim if isinstance(node, fx.Node) else 0


def _cast(at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """The node in the dtype of another: one attention node takes one dtype, however the scores were computed."""
    dtype = like.meta["val"].dtype
    return node if node.meta["val"].dtype is dtype else _call(at, aten.to.dtype, node, dtype)


def _call(at: fx.Node, target: Any, *args: Any, after: bool = False, **kwargs: Any) -> fx.Node:
    """A new node with its value, belonging to the module of `at`."""
    graph = at.graph
    if after:
        with graph.inserting_after(at):
            node = graph.call_function(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta = {**at.meta, "val": target(*values, **named)}
    return node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _descends(node: fx.node.Argument, ancestor: fx.Node) -> bool:
    while isinstance(node, fx.Node) and node is not ancestor:
        node = node.args[0] if node.target in _NEUTRAL else None
    return node is ancestor
