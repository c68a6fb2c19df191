"""What a mask's graph tells of its values: linear attention can keep a mask that is the same for all queries, and no other."""

from __future__ import annotations

from torch import fx

from edit_compile.passes.axes.algebra import hint
from edit_compile.passes.graph_walk import op_name, shape_of
from edit_compile.passes.op_traits import VIEW_OPS, is_pointwise

_EXPANDS = ("expand", "repeat", "broadcast_to", "expand_as")
_KEEPS = VIEW_OPS | {"cat", "pad", "constant_pad_nd", "repeat_interleave", "to", "_to_copy", "type_as"}
_FOR_A_WHOLE_QUERY = ("add", "mul", "bitwise_and", "logical_and", "__and__")


def same_for_all_queries(mask: fx.Node) -> bool:
    """Say whether the rows of a mask (..., queries, keys) are known to be equal, except for queries that are masked as a whole.

    Such a query, as padding makes them, attends to nothing; what its row says of single keys has no effect.
    """
    shape = shape_of(mask)
    if shape is not None and (len(shape) < 2 or hint(shape[-2]) == 1):
        return True
    sources = [node for node in mask.all_input_nodes if shape_of(node) is not None]
    if shape is None or not sources:
        return False
    name = op_name(mask)
    if name in _EXPANDS:
        return same_for_all_queries(sources[0])
    if name in _FOR_A_WHOLE_QUERY:
        return all(_columns(source) == 1 or same_for_all_queries(source) for source in sources)
    if is_pointwise(mask):
        return all(same_for_all_queries(source) for source in sources)
    return name in _KEEPS and all(_rows(source) == hint(shape[-2]) and same_for_all_queries(source) for source in sources)


def _columns(mask: fx.Node) -> int | None:
    shape = shape_of(mask)
    return hint(shape[-1]) if shape else None


def _rows(mask: fx.Node) -> int | None:
    shape = shape_of(mask) or ()
    return hint(shape[-2]) if len(shape) > 1 else None
