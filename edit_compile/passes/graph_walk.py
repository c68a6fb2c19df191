"""Walking and reading FX graphs: what a node is computed from, what lies between two nodes, its operands by type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx


def operand(node: fx.Node, index: int) -> fx.Node:
    """Return a positional argument that is a node.

    Raises:
        TypeError: it is something else.
    """
    found = node.args[index]
    if not isinstance(found, fx.Node):
        raise TypeError(f"argument {index} of {node.name} is {found!r}, not a node")
    return found


def number(node: fx.Node, index: int) -> int:
    """Return a positional argument that is a whole number.

    Raises:
        TypeError: it is something else.
    """
    found = node.args[index]
    if not isinstance(found, int):
        raise TypeError(f"argument {index} of {node.name} is {found!r}, not a number")
    return found


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the shape of a node's tensor, sizes symbolic; None if it is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def op_name(node: fx.Node) -> str:
    """Return an operator's name without namespace and overload."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def upstream(node: fx.Node, *, enter: Callable[[fx.Node], bool] = lambda node: True) -> Iterator[fx.Node]:
    """Yield a node and what it is computed from, nearest first, each once.

    Args:
        enter: whether to go on behind a node; the node itself is yielded either way.
    """
    seen, pending = {node}, [node]
    while pending:
        at = pending.pop(0)
        yield at
        if not enter(at):
            continue
        for source in at.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)


def downstream(nodes: set[fx.Node], graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes and whatever is computed from them."""
    found = set(nodes)
    for node in graph.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """List the nodes on every way from `first` to `last`, both included, in order."""
    down, up = downstream({first}, first.graph), set(upstream(last))
    return [node for node in first.graph.nodes if node in down and node in up]


def module_path(node: fx.Node) -> str:
    """Return the path of the module whose forward a node belongs to, "" for the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([path for path, _ in stack.values()]), "")


def source_line(node: fx.Node) -> str | None:
    """Return the line of the model's source that a node comes from, `file.py:12 (code)`, if capture has noted it."""
    trace = node.meta.get("stack_trace")
    lines = [line.strip() for line in str(trace).splitlines() if line.strip()] if trace else []
    frames = [(lines[i], lines[i + 1] if i + 1 < len(lines) else "") for i, line in enumerate(lines) if line.startswith('File "')]
    own = [frame for frame in frames if "/torch/" not in frame[0]]
    if not own:
        return None
    where, code = own[-1]
    file, _, rest = where.removeprefix('File "').partition('", line ')
    return f"{file}:{rest.partition(',')[0]} ({code})"


def remove_dead(graph: fx.Graph) -> None:
    """Eliminate dead code; a captured graph has no effects but its outputs."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
