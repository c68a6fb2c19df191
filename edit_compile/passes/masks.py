"""What a mask's graph tells of its values: linear attention can keep a mask that is the same for all queries, and no other."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, fx

from edit_compile.ir.plan import MaskKind
from edit_compile.passes.axes.algebra import hint
from edit_compile.passes.constant_masks import computed_masks
from edit_compile.passes.graph_walk import op_name, shape_of, upstream
from edit_compile.passes.op_traits import VIEW_OPS, is_pointwise
from edit_compile.passes.read_scores import LOWEST_MASK

_EXPANDS = ("expand", "repeat", "broadcast_to", "expand_as")
_KEEPS = VIEW_OPS | {"cat", "pad", "constant_pad_nd", "repeat_interleave", "to", "_to_copy", "type_as"}
_FOR_A_WHOLE_QUERY = ("add", "mul", "bitwise_and", "logical_and", "__and__")


def mask_facts(mask: fx.Node | None, reader: fx.Node, weights: Set[fx.Node] = frozenset()) -> tuple[MaskKind, bool]:
    """Tell what a mask (..., queries, keys) does, and whether it is causal. One that lets all keys take part is none.

    Args:
        reader: the attention, before which the mask may be written into.
        weights: the graph's inputs that are parameters of the model.
    """
    if mask is None:
        return "none", False
    values = list(computed_masks(mask, reader))
    if not values:
        return _kind(mask, reader, weights), False
    if all(map(_lets_all, values)):
        return "none", False
    if all(map(_is_causal, values)):
        return "none", True
    return ("by_key" if all(map(_has_equal_rows, values)) else "by_query"), False


def _kind(mask: fx.Node, reader: fx.Node, weights: Set[fx.Node]) -> MaskKind:
    if same_for_all_queries(mask, reader):
        return "by_key"
    value = mask.meta.get("val")
    is_added = isinstance(value, Tensor) and value.is_floating_point()
    return "bias" if is_added and not weights.isdisjoint(upstream(mask)) else "by_query"


def _lets_all(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype is torch.bool else not mask.any()


def _is_causal(mask: Tensor) -> bool:
    """Say whether every query is let to see the keys up to its own position, and no others."""
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    taken = mask if mask.dtype is torch.bool else mask > LOWEST_MASK
    return torch.equal(taken, torch.ones_like(taken).tril())


def _has_equal_rows(mask: Tensor) -> bool:
    return mask.ndim < 2 or torch.equal(mask, mask[..., :1, :].expand_as(mask))


def same_for_all_queries(mask: fx.Node, reader: fx.Node, *, but_masked: bool = True) -> bool:
    """Say whether the rows of a mask (..., queries, keys) are known to be equal, except for queries that are masked as a whole.

    Such a query, as padding makes them, attends to nothing; what its row says of single keys has no effect.

    Args:
        reader: what uses the mask; writes into it before that count.
        but_masked: whether there may be such queries.
    """
    shape = shape_of(mask)
    if shape is not None and (len(shape) < 2 or hint(shape[-2]) == 1):
        return True
    sources = [node for node in mask.all_input_nodes if shape_of(node) is not None]
    if shape is None:
        return False
    if values := list(computed_masks(mask, reader)):
        return all(map(_has_equal_rows, values))
    if not sources:
        return False
    name = op_name(mask)
    if name in _EXPANDS:
        return same_for_all_queries(sources[0], mask, but_masked=but_masked)
    if name in _FOR_A_WHOLE_QUERY and but_masked:
        return all(_columns(source) == 1 or same_for_all_queries(source, mask) for source in sources)
    same = [same_for_all_queries(source, mask, but_masked=but_masked) for source in sources]
    return all(same) and (is_pointwise(mask) or (name in _KEEPS and all(_rows(source) == hint(shape[-2]) for source in sources)))


def _columns(mask: fx.Node) -> int | None:
    shape = shape_of(mask)
    return hint(shape[-1]) if shape else None


def _rows(mask: fx.Node) -> int | None:
    shape = shape_of(mask) or ()
    return hint(shape[-2]) if len(shape) > 1 else None
