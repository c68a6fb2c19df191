"""Attention in one form: a scaled_dot_product_attention node over (batch, heads, tokens, channels).

Attention written by hand becomes such a node (`read_attention`), heads folded into the batch a dimension, and attention
computed for some of the queries at a time one computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edit_compile.passes.einsum import Names
from edit_compile.passes.graph_walk import remove_dead, upstream
from edit_compile.passes.products import permutation, product_of
from edit_compile.passes.query_chunks import join_query_chunks
from edit_compile.passes.read_attention import UNREAD, Normalized, ReadAttention, normalized, read_attention
from edit_compile.passes.read_scores import NotRead, Placed
from edit_compile.passes.writes import functionalize_writes

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_TRAILING = 2  # rows and channels, or rows and columns


def canonicalize(graph: fx.Graph) -> int:
    """Rewrite in place; returns how many attentions written by hand were found. What is not read says why in its softmax's meta."""
    functionalize_writes(graph)
    remove_dead(graph)  # such as returned attention weights that nobody uses
    found = sum(_rewrite(each.node, each) for each in list(normalized(graph)))
    joined = join_query_chunks(graph)
    unfolded = sum(_unfold_heads(node) for node in list(graph.nodes) if node.target is SDPA)
    if found or unfolded or joined:
        remove_dead(graph)
        graph.lint()
    return found


def drop_returned_weights(graph: fx.Graph) -> int:
    """Return None in the place of attention weights, counts them: for a module whose weights its model is known not to read."""
    weights = {each.node for each in normalized(graph)}
    output = graph.output_node()
    dropped = [leaf for leaf in output.all_input_nodes if _made_of(leaf, weights)]
    output.args = fx.node.map_arg(output.args, lambda leaf: None if leaf in dropped else leaf)
    return len(dropped)


def _made_of(leaf: fx.Node, weights: set[fx.Node]) -> bool:
    """Say whether a tensor is made of attention weights and of no product, such as that with the values."""
    found = set(upstream(leaf, enter=lambda at: product_of(at) is None and at not in weights))
    return not weights.isdisjoint(found) and all(product_of(at) is None for at in found)


# ------------------------------------------------------------------ attention written by hand


def _rewrite(softmax: fx.Node, found: Normalized) -> bool:
    """Replace a softmax and the products around it with one node; says whether it could."""
    try:
        read = read_attention(found)
        with softmax.graph.inserting_before(read.result):
            read.result.replace_all_uses_with(_emit(read, read.result))
    except NotRead as reason:
        softmax.meta[UNREAD] = str(reason)
        return False
    return True


def _emit(read: ReadAttention, at: fx.Node) -> fx.Node:
    """Add the attention of what was read; returns the node with the dimensions of its result."""
    emit = _Emitter(at, read.composed)
    lead = _lead(read, emit)
    value = emit.ordered(read.value, (*lead, read.column, read.width))
    query = emit.cast(emit.ordered(read.query, (*lead, read.row, read.depth)), value)
    key = emit.cast(emit.ordered(read.key, (*lead, read.column, read.depth)), value)
    scale: Any = read.scores.scale
    if read.scores.symbolic_scale is not None:
        query = query if scale == 1 else emit(aten.mul.Tensor, query, scale)
        scale = read.scores.symbolic_scale
    for factor in read.scores.factors:
        by_row = not factor.has(read.column)
        spread = emit.ordered(factor, (*lead, read.row if by_row else read.column, read.column if by_row else read.row))
        scaled = emit(aten.div.Tensor if factor.inverse else aten.mul.Tensor, query if by_row else key, spread)
        query, key = (emit.cast(scaled, value), key) if by_row else (query, emit.cast(scaled, value))
    mask = _mask(read, emit, lead)
    attention = emit.attention(query, key, value, mask, scale)
    for gate in read.gates:
        attention = emit.cast(emit(aten.mul.Tensor, attention, emit.ordered(gate, (*lead, read.row, read.column))), value)
    if read.scale_after != 1:
        attention = emit(aten.mul.Tensor, attention, read.scale_after)
    return emit.cast(emit.restored(attention, (*lead, read.row, read.width), read.names), at)


def _lead(read: ReadAttention, emit: _Emitter) -> Names:
    """Order the dimensions before queries and channels: what varies, as the batch, before what is fixed, as the heads."""
    names = [each for name in read.names for each in emit.parts(name) if name not in (read.row, read.width)]
    names = [name for name in names if not name.startswith("1@")]
    sizes = {name: size for placed in (read.query, read.value, read.key) for name, size in emit.sizes(placed).items() if size != 1}
    return tuple(sorted(names, key=lambda name: isinstance(sizes.get(name, 1), int)))


def _mask(read: ReadAttention, emit: _Emitter, lead: Names) -> fx.Node | None:
    """Make the mask that scaled_dot_product_attention takes: two dimensions or more; booleans are true where a key takes part."""
    taken: fx.Node | None = None
    added: fx.Node | None = None
    for mask in read.scores.masks:
        node = emit.ordered(mask, (*lead, read.row, read.column), short=True)
        if mask.form == "added":
            node = node if mask.factor == 1 else emit(aten.mul.Tensor, node, mask.factor)
            added = node if added is None else emit(aten.add.Tensor, added, node)
        else:
            node = emit(aten.logical_not.default, node) if mask.form == "left_out" else emit.boolean(node)
            taken = node if taken is None else emit(aten.logical_and.default, taken, node)
    if taken is None or added is None:
        return taken if added is None else added
    return emit(aten.where.ScalarOther, taken, added, float("-inf"))


class _Emitter:
    """Adds nodes at the graph's insertion point, as part of the module of `at`, and brings dimensions into order by their names."""

    def __init__(self, at: fx.Node, composed: Mapping[str, tuple[str, str, Any]]) -> None:
        self.at, self.composed = at, composed

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        """Add a call, with its value."""
        node = self.at.graph.call_function(target, args)
        node.meta = {**self.at.meta, "val": target(*fx.node.map_arg(args, lambda each: each.meta["val"]))}
        return node

    def parts(self, name: str) -> Names:
        """Take a dimension that a reshape has merged apart."""
        return tuple(part for each in self.composed[name][:2] for part in self.parts(each)) if name in self.composed else (name,)

    def sizes(self, placed: Placed) -> dict[str, Any]:
        """Tell the sizes of a tensor's dimensions, those of merged ones by part."""
        sizes: dict[str, Any] = {}
        for name, size in zip(placed.names, _value(placed.node).shape, strict=True):
            first, *_ = parts = self.parts(name)
            sizes[first] = size
            if len(parts) > 1:
                sizes |= {parts[-1]: self.composed[name][2]}
        return sizes

    def ordered(self, placed: Placed, wanted: Names, *, short: bool = False) -> fx.Node:
        """Bring a tensor's dimensions into this order; those that it has not get size 1, unless they come first and `short` is set."""
        node, names = placed.node, list(placed.names)
        while tuple(names) != wanted and (order := permutation(node)) is not None:  # back to where its dimensions were not yet reordered
            names = [names[order.index(dim)] for dim in range(len(order))]
            node = node.args[0]  # type: ignore[assignment]
        for dim in reversed(range(len(names))):
            if names[dim] in self.composed:
                node = self._taken_apart(node, dim, names)
            elif names[dim] not in wanted:
                node = self(aten.squeeze.dim, node, dim)
                del names[dim]
        node = self.permuted(node, names, [name for name in wanted if name in names])
        missing = [dim for dim, name in enumerate(wanted) if name not in names]
        if short:
            first = min(next((dim for dim, name in enumerate(wanted) if name in names), len(wanted)), len(wanted) - _TRAILING)
            missing = [dim - first for dim in missing if dim >= first]
        for dim in missing:
            node = self(aten.unsqueeze.default, node, dim)
        return node

    def _taken_apart(self, node: fx.Node, dim: int, names: list[str]) -> fx.Node:
        first, second, size = self.composed[names[dim]]
        if not isinstance(size, int):
            raise NotRead(f"its scores are reshaped by {size}, which depends on the sizes of the inputs")
        names[dim : dim + 1] = [first, second]
        shape = [1, 1] if _value(node).shape[dim] == 1 else [-1, size]
        return self(aten.unflatten.int, node, dim, shape)

    def permuted(self, node: fx.Node, names: Sequence[str], wanted: Sequence[str]) -> fx.Node:
        """Reorder dimensions, if they are not in order."""
        order = [list(names).index(name) for name in wanted]
        moved = [dim for dim, source in enumerate(order) if dim != source]
        if not moved:
            return node
        if len(moved) == len(("one", "other")):
            a, b = (dim - len(order) for dim in moved) if moved[-1] == len(order) - 1 else moved
            return self(aten.transpose.int, node, a, b)
        return self(aten.permute.default, node, order)

    def restored(self, node: fx.Node, names: Names, wanted: Names) -> fx.Node:
        """Bring the result's dimensions into the order that the model has them in, merged where it merges them."""
        parts = [part for name in wanted for part in self.parts(name) if part in names]
        node = self.permuted(node, names, parts)
        for dim, name in enumerate(wanted):
            if name in self.composed:
                node = self(aten.flatten.using_ints, node, dim, dim + len(self.parts(name)) - 1)
            elif name.startswith("1@"):
                node = self(aten.unsqueeze.default, node, dim)
        return node

    def attention(self, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None, scale: Any) -> fx.Node:
        """Add the attention node."""
        node = self.at.graph.call_function(SDPA, (query, key, value, *([mask] if mask is not None else [])), {"scale": scale})
        scores = torch.matmul(_value(query), _value(key).transpose(-1, -2))
        node.meta = {**self.at.meta, "val": torch.matmul(scores, _value(value))}
        return node

    def cast(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """Bring a node to the dtype of another: one attention node takes one dtype, however the scores were computed."""
        dtype = _value(like).dtype
        return node if _value(node).dtype is dtype else self(aten.to.dtype, node, dtype)

    def boolean(self, mask: fx.Node) -> fx.Node:
        """Make a mask boolean, as older models have numbers."""
        return mask if _value(mask).dtype is torch.bool else self(aten.to.dtype, mask, torch.bool)


# ------------------------------------------------------------------ heads folded into the batch


def _unfold_heads(attention: fx.Node) -> bool:
    """Turn (B, N, D) operands into (B, 1, N, D), and (B * H, N, D) into (B, H, N, D) where H is a number."""
    if _value(attention).ndim != 3:
        return False
    graph, heads = attention.graph, _factor(_value(attention).shape[0])
    emit = _Emitter(attention, {})
    with graph.inserting_before(attention):
        unfolded = [_unfolded(emit, each, heads) if isinstance(each, fx.Node) else each for each in attention.args[:4]]
        new = graph.call_function(SDPA, (*unfolded, *attention.args[4:]), attention.kwargs)
        new.meta = {**attention.meta, "val": aten.unflatten.int(_value(attention), 0, (-1, heads))}
        result = emit(aten.flatten.using_ints, new, 0, 1) if heads > 1 else emit(aten.squeeze.dim, new, 1)
    attention.replace_all_uses_with(result)
    graph.erase_node(attention)
    return True


def _unfolded(emit: _Emitter, node: fx.Node, heads: int) -> fx.Node:
    if _value(node).ndim != 3:
        return node
    if heads == 1 or _value(node).shape[0] == 1:
        return emit(aten.unsqueeze.default, node, 1)
    return emit(aten.unflatten.int, node, 0, [-1, heads])


def _factor(size: Any) -> int:
    """Return the number that a symbolic size is a multiple of; 1 for a number."""
    if isinstance(size, int):
        return 1
    heads: Any = size.node.expr.as_coeff_Mul()[0]
    return int(heads) if heads.is_Integer and heads > 1 else 1


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
