"""Attention computed for some of the queries at a time, to save memory: one attention after all."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from edit_compile.passes.axes.algebra import hint
from edit_compile.passes.graph_walk import argument, number, op_name, operand, operands
from edit_compile.passes.products import rank

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_FIRST_OPTION = 3  # of the attention's arguments behind query, key and value


def join_query_chunks(graph: fx.Graph) -> int:
    """Replace attentions over parts of the same queries, joined again, with one over all; counts those that were joined."""
    return sum(_join(node) for node in list(graph.nodes) if op_name(node) in ("cat", "concat", "concatenate") and _is_list(node))


def _is_list(node: fx.Node) -> bool:
    return len(node.args) > 0 and isinstance(node.args[0], list | tuple) and all(isinstance(each, fx.Node) for each in node.args[0])


def _join(cat: fx.Node) -> int:
    parts = operands(cat, 0)
    first = parts[0]
    if len(parts) < 2 or number(cat, 1, "dim", 0) % rank(cat) != rank(cat) - 2:
        return 0
    if any(part.target is not SDPA or _options(part) != _options(first) or len(part.users) != 1 for part in parts):
        return 0
    whole = _whole([operand(part, 0) for part in parts])
    if whole is None or argument(first, _FIRST_OPTION, "attn_mask") is not None or argument(first, 5, "is_causal"):
        return 0
    with cat.graph.inserting_before(cat):
        joined = cat.graph.call_function(SDPA, (whole, *first.args[1:]), first.kwargs)
    joined.meta = {**first.meta, "val": cat.meta["val"]}
    cat.replace_all_uses_with(joined)
    return len(parts)


def _options(attention: fx.Node) -> tuple[Any, ...]:
    """Return all that parts of one attention have in common."""
    return (attention.args[1:], dict(attention.kwargs))


def _whole(parts: list[fx.Node]) -> fx.Node | None:
    """Find the tensor that parts are cut from, along the tokens and without gaps; None if they are not."""
    sources = {operand(_cut(part), 0) for part in parts if op_name(_cut(part)) in ("slice", "split", "chunk", "split_with_sizes", "narrow")}
    if len(sources) != 1:
        return None
    source = sources.pop()
    position, tokens = 0, rank(source) - 2
    for part in parts:
        start = _start(part, tokens)
        if start != position or rank(part) != rank(source):
            return None
        position += hint(part.meta["val"].shape[tokens])
    return source if position == hint(source.meta["val"].shape[tokens]) else None


def _cut(part: fx.Node) -> fx.Node:
    return operand(part, 0) if part.target is operator.getitem else part


def _start(part: fx.Node, tokens: int) -> int | None:
    """Tell where a part begins; None if it is not cut along the tokens, one by one."""
    cut = _cut(part)
    at = 1 if op_name(cut) in ("slice", "narrow") else 2
    if number(cut, at, "dim", 0) % rank(operand(cut, 0)) != tokens:
        return None
    if cut is not part:
        return sum(hint(each.shape[tokens]) for each in cut.meta["val"][: number(part, 1)])
    start = argument(cut, 2, "start", 0) or 0
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    return hint(start) if argument(cut, 4, "step", 1) == 1 or op_name(cut) == "narrow" else None
