"""Attention written by hand, softmax(Q K^T * scale + mask) V, becomes one scaled_dot_product_attention node."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_MATMULS = (aten.matmul.default, aten.bmm.default)
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_NEUTRAL = (aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.type_as.default)


def canonicalize(graph: fx.Graph) -> int:
    """Rewrite in place; returns how many attentions were found."""
    found = sum(_rewrite(node) for node in list(graph.nodes) if node.target in _SOFTMAXES)
    if found:
        graph.eliminate_dead_code()
        graph.lint()
    return found


def _rewrite(softmax: fx.Node) -> bool:
    rank = softmax.meta["val"].ndim
    if softmax.args[1] not in (-1, rank - 1):
        return False
    product = _only_user(softmax)
    while product is not None and product.target in _NEUTRAL:
        product = _only_user(product)
    scores, scale, mask = _scores(softmax.args[0])
    if product is None or product.target not in _MATMULS or scores is None or not _descends(product.args[0], softmax):
        return False
    graph = softmax.graph
    query, transposed, value = scores.args[0], scores.args[1], product.args[1]
    with graph.inserting_before(product):
        key = graph.call_function(aten.transpose.int, (transposed, -1, -2))
        key.meta = {**product.meta, "val": transposed.meta["val"].transpose(-1, -2)}
        attention = graph.call_function(aten.scaled_dot_product_attention.default, (query, key, value, mask), {"scale": scale})
    attention.meta = dict(product.meta)
    product.replace_all_uses_with(attention)
    return True


def _scores(node: fx.node.Argument) -> tuple[fx.Node | None, float, fx.Node | None]:
    """Q K^T behind a scale, a mask and casts."""
    scale, mask = 1.0, None
    while isinstance(node, fx.Node) and node.target not in _MATMULS:
        if node.target in _NEUTRAL:
            node = node.args[0]
        elif node.target is aten.mul.Tensor and isinstance(node.args[1], int | float):
            node, scale = node.args[0], scale * node.args[1]
        elif node.target is aten.div.Tensor and isinstance(node.args[1], int | float):
            node, scale = node.args[0], scale / node.args[1]
        elif node.target is aten.add.Tensor and mask is None and scale == 1.0 and isinstance(node.args[1], fx.Node):
            node, mask = node.args
        else:
            return None, scale, None
    return (node if isinstance(node, fx.Node) else None), scale, mask


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _descends(node: fx.node.Argument, ancestor: fx.Node) -> bool:
    while isinstance(node, fx.Node) and node is not ancestor:
        node = node.args[0] if node.target in _NEUTRAL else None
    return node is ancestor
