"""What a mask's graph tells of its values: only a mask by key can be kept where attention is linear."""

from __future__ import annotations

import torch
from torch import fx

from edit_compile.passes.axes.algebra import hint
from edit_compile.passes.graph_walk import shape_of
from edit_compile.passes.op_traits import VIEW_OPS, op_name

_EXPANDS = ("expand", "repeat", "broadcast_to", "expand_as")
_KEEPS = VIEW_OPS | {"cat", "pad", "constant_pad_nd", "repeat_interleave", "to", "_to_copy", "type_as"}
_FOR_A_WHOLE_QUERY = ("add", "mul", "bitwise_and", "logical_and", "__and__")


def same_for_all_queries(mask: fx.Node) -> bool:
    """Whether the rows of a mask (..., queries, keys) are known to be equal, but for queries that are masked as a whole.

    Such a query, as padding makes them, attends to nothing; what its row says of single keys has no effect.
    """
    shape = shape_of(mask)
    if shape is not None and (len(shape) < 2 or hint(shape[-2]) == 1):
        return True
    operands = [n for n in mask.all_input_nodes if shape_of(n) is not None]
    if shape is None or not operands:
        return False
    name = op_name(mask)
    if name in _EXPANDS:
        return same_for_all_queries(operands[0])
    if name in _FOR_A_WHOLE_QUERY:
        return all(_one_column(operand) or same_for_all_queries(operand) for operand in operands)
    if torch.Tag.pointwise in getattr(mask.target, "tags", ()):
        return all(same_for_all_queries(operand) for operand in operands)
    return name in _KEEPS and all(_has_rows(operand, hint(shape[-2])) and same_for_all_queries(operand) for operand in operands)


def _one_column(node: fx.Node) -> bool:
    shape = shape_of(node)
    return bool(shape) and hint(shape[-1]) == 1


def _has_rows(node: fx.Node, rows: int) -> bool:
    shape = shape_of(node) or ()
    return len(shape) > 1 and hint(shape[-2]) == rows
