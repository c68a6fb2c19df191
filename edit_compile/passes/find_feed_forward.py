"""Every feed-forward network in a graph: projections to hidden channels, a nonlinearity token by token, a last projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from edit_compile.passes.find_attention import is_linear
from edit_compile.passes.graph_walk import op_name, operand, upstream
from edit_compile.passes.op_traits import is_pointwise

_LINEAR_OPS = frozenset(["add", "sub", "mul", "div", "neg", "clone", "dropout", "to", "_to_copy", "type_as"])
_VIEWS = frozenset(["chunk", "split", "split_with_sizes", "getitem", "slice", "unbind", "contiguous", "detach", "alias", "view", "reshape"])


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network.

    Attributes:
        hidden: its first projections, two where one gates the other by a Linear of its own.
        output: its last projection.
        path: the innermost module that holds all of it.
        index: which of the networks of that module.
    """

    hidden: tuple[fx.Node, ...]
    output: fx.Node
    path: str
    index: int = 0

    @property
    def source(self) -> fx.Node:
        """Return what enters: (B, N, C)."""
        return operand(self.hidden[0], 0)


def find_feed_forward(graph: fx.Graph) -> list[FeedForward]:
    """List the feed-forward networks of a graph, in order of execution, whatever tokens they work on."""
    seen: dict[str, int] = {}
    found = []
    for node in graph.nodes:
        hidden = _hidden_of(node) if is_linear(node) else None
        if hidden:
            path = _called_path([*hidden, node])
            found.append(FeedForward(hidden, node, path, seen.get(path, 0)))
            seen[path] = seen.get(path, 0) + 1
    return found


def _hidden_of(output: fx.Node) -> tuple[fx.Node, ...] | None:
    """Find the first projections of the network that ends in this one; None if it is the end of none."""
    start = operand(output, 0)
    inside = list(upstream(start, enter=lambda at: not is_linear(at) and at.op in ("call_function", "call_module")))
    hidden = tuple(at for at in inside if is_linear(at))
    rest = [at for at in inside if not is_linear(at)]
    if not 1 <= len(hidden) <= 2 or any(operand(h, 0) is not operand(hidden[0], 0) for h in hidden):
        return None
    if not all(_token_wise(at) for at in rest) or not any(_nonlinear(at) for at in rest):
        return None
    return hidden


def _token_wise(node: fx.Node) -> bool:
    """Say whether a node treats tokens and channels one by one, or is a collapsed activation; parameters and constants pass."""
    if node.op in ("placeholder", "get_attr"):
        return node.op == "get_attr"
    return node.op == "call_module" or op_name(node) in _VIEWS or op_name(node) in _LINEAR_OPS or is_pointwise(node)


def _nonlinear(node: fx.Node) -> bool:
    return node.op == "call_module" or (is_pointwise(node) and op_name(node) not in _LINEAR_OPS)


def _called_path(nodes: list[fx.Node]) -> str:
    """Find the innermost module whose call holds all the nodes. A ModuleList has no call, so it is none."""
    stacks = [[path for path, _ in (node.meta.get("nn_module_stack") or {}).values()] for node in nodes]
    shared = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        shared = level[0]
    return shared
