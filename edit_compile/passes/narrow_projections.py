"""Compute only the channels that are read of a fused projection that runs a second time, for the query that a design changes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from edit_compile.designs.ops.fused_projection import project_part
from edit_compile.passes.graph_walk import argument, op_name, operand, remove_dead
from edit_compile.passes.site_graph import SiteGraph

_DIMENSION = {"split": 2, "split_with_sizes": 2, "chunk": 2}  # which argument it is, of what cuts


def narrow_projections(site: SiteGraph) -> int:
    """Replace calls of a projection of which a single part is read, cut along the channels; counts them."""
    found = 0
    for node in list(site.graph.nodes):
        if node.op != "call_module" or not node.meta.get("linear"):
            continue
        part = _only_part(node)
        if part is None:
            continue
        read, start, stop = part
        with site.graph.inserting_before(node):
            projection = site.graph.get_attr(str(node.target))
            new = site.graph.call_function(project_part, (projection, operand(node, 0), start, stop))
        new.meta = dict(read.meta)
        read.replace_all_uses_with(new)
        found += 1
    remove_dead(site.graph)
    return found


def _only_part(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Find the only part of a tensor's channels that is read, with where it begins and ends; None if all or several are."""
    start, stop, found = 0, 0, False
    while True:
        cut = next(iter(node.users), None)
        if cut is None or len(node.users) != 1 or op_name(cut) not in _DIMENSION or not _along_channels(cut, node):
            return (node, start, stop) if found else None
        read = next(iter(cut.users), None)
        if read is None or len(cut.users) != 1 or read.target is not operator.getitem:
            return None
        index, sizes = read.args[1], [int(piece.shape[-1]) for piece in cut.meta["val"]]
        if not isinstance(index, int):
            return None
        start += sum(sizes[: index % len(sizes)])
        stop, found, node = start + sizes[index], True, read


def _along_channels(cut: fx.Node, node: fx.Node) -> bool:
    place, value = _DIMENSION[op_name(cut)], node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(cut.meta.get("val"), list | tuple):
        return False
    dim = argument(cut, place, "dim") if len(cut.args) > place or "dim" in cut.kwargs else 0
    return isinstance(dim, int) and dim % value.ndim == value.ndim - 1 and isinstance(value.shape[-1], int)
