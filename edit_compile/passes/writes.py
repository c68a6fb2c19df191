"""Writes into tensors (`x += y`, `dropout_`) as operations that return a new tensor, where nobody else sees the old one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edit_compile.passes.graph_walk import op_name
from edit_compile.passes.op_traits import VIEW_OPS
from edit_compile.torch_internals import writes_into_operand

aten = torch.ops.aten
_MAY_RETURN_THEIR_OPERAND = VIEW_OPS | frozenset("to type_as dropout expand expand_as view_as reshape_as narrow ravel".split())  # noqa: SIM905


def functionalize_writes(graph: fx.Graph) -> int:
    """Replace writes into a whole tensor of the graph's own by operations without effect; counts them.

    Writes into an input, a weight, or a tensor that something else is a view of stay as they are.
    """
    done = 0
    for node in list(graph.nodes):
        target = _functional(node)
        if target is not None and _is_alone(node):
            _replace(node, target)
            done += 1
    return done


def is_written(node: fx.Node) -> bool:
    """Say whether a write that stays changes a tensor, or a part of it, after it was made."""
    return any((writes_into_operand(user.target) and user.args[0] is node) or (_aliases(user) and is_written(user)) for user in node.users)


def _functional(node: fx.Node) -> Any:
    """Find the operator that returns what this one writes; None if there is none, or it writes nothing."""
    name = op_name(node)
    if node.op != "call_function" or not writes_into_operand(node.target) or not name.endswith("_") or name.endswith("__"):
        return None
    overload = getattr(getattr(aten, name[:-1], None), getattr(node.target, "_overloadname", ""), None)
    return overload if overload is not None and not writes_into_operand(overload) else None


def _is_alone(write: fx.Node) -> bool:
    """Say whether what is written has been made in the graph, and nothing else can see that it changes."""
    seen, at = write, write.args[0]
    while isinstance(at, fx.Node) and at.op == "call_function":
        if any(user is not seen and _aliases(user) for user in at.users):
            return False
        if seen is not write and any(user is not seen and user > write for user in at.users):
            return False  # it reads the whole, of which a part is written
        if not _aliases(at):
            return True
        seen, at = at, at.all_input_nodes[0]
    return False


def _aliases(node: fx.Node) -> bool:
    """Say whether a node's tensor may share the memory of its first operand."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", [])
    name = op_name(node)
    return name in _MAY_RETURN_THEIR_OPERAND or (not name.endswith("_") and any(each.alias_info is not None for each in returns))


def _replace(write: fx.Node, target: Any) -> None:
    graph, written = write.graph, write.args[0]
    assert isinstance(written, fx.Node)
    with graph.inserting_before(write):
        new = graph.call_function(target, write.args, write.kwargs)
        new.meta = dict(write.meta)
    later = set()
    at = write
    while at.op != "root":
        later.add(at)
        at = at.next
    written.replace_all_uses_with(new, delete_user_cb=lambda user: user in later and user is not new)
    write.replace_all_uses_with(new)
    graph.erase_node(write)
