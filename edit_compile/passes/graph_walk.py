"""Walking and reading FX graphs: what a node is computed from, what lies between two nodes, its arguments by type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from edit_compile.torch_internals import ROOT_CALL, TORCH_FOLDER, writes_into_operand

_SITE_PACKAGES = re.compile(r"[/\\](?:site|dist)-packages[/\\]")
_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+)[^\n]*(?:\n\s*(?!File ")(?P<code>\S[^\n]*))?')

# ------------------------------------------------------------------ arguments


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument, given by position or by name, whatever it is."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def operand(node: fx.Node, index: int) -> fx.Node:
    """Return a positional argument that is a node.

    Raises:
        TypeError: it is something else.
    """
    found = node.args[index]
    if not isinstance(found, fx.Node):
        raise TypeError(f"argument {index} of {node.name} is {found!r}, not a node")
    return found


def optional_operand(node: fx.Node, index: int, name: str) -> fx.Node | None:
    """Return an argument if it is a node; None if it is left out or something else."""
    found = argument(node, index, name)
    return found if isinstance(found, fx.Node) else None


def operands(node: fx.Node, index: int) -> list[fx.Node]:
    """Return a positional argument that is a list of nodes, such as what `cat` joins.

    Raises:
        TypeError: it is something else.
    """
    found = node.args[index]
    nodes = [each for each in found if isinstance(each, fx.Node)] if isinstance(found, list | tuple) else []
    if not isinstance(found, list | tuple) or len(nodes) < len(found):
        raise TypeError(f"argument {index} of {node.name} is {found!r}, not a list of nodes")
    return nodes


def number(node: fx.Node, index: int, name: str = "", default: int | None = None) -> int:
    """Return an argument that is a whole number, such as a dimension.

    Raises:
        TypeError: it is something else, or left out and without a default.
    """
    found = argument(node, index, name, default)
    if not isinstance(found, int):
        raise TypeError(f"argument {index} of {node.name} is {found!r}, not a number")
    return found


def numbers(node: fx.Node, index: int, name: str = "") -> list[int]:
    """Return an argument that is one whole number or a list of them, such as dimensions.

    Raises:
        TypeError: it is something else.
    """
    found = argument(node, index, name)
    listed = list(found) if isinstance(found, list | tuple) else [found]
    if not all(isinstance(each, int) for each in listed):
        raise TypeError(f"argument {index} of {node.name} is {found!r}, not numbers")
    return listed


# ------------------------------------------------------------------ facts of a node


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the shape of a node's tensor, sizes symbolic; None if it is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def op_name(node: fx.Node) -> str:
    """Return an operator's name without namespace and overload."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def module_calls(node: fx.Node) -> list[tuple[str, str]]:
    """List the submodule calls that a node was captured in, outermost first: a key that tells calls apart, and the module's path."""
    calls = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items() if path]
    return [] if calls and ROOT_CALL in calls[0][1] else calls


def module_path(node: fx.Node) -> str:
    """Return the path of the module whose forward a node belongs to, "" for the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([path for path, _ in stack.values()]), "")


def source_line(node: fx.Node) -> str | None:
    """Return the line of the model's source that a node comes from, `package/file.py:12 (code)`; None if there is no trace of it."""
    frames = [found for found in _FRAME.finditer(node.meta.get("stack_trace") or "") if not found["file"].startswith(TORCH_FOLDER)]
    return f"{path_in_package(frames[-1]['file'])}:{frames[-1]['line']} ({frames[-1]['code'] or '?'})" if frames else None


def path_in_package(file: str) -> str:
    """Return a source file's path from its package's folder on, or its name alone: the folders of this machine mean nothing elsewhere."""
    *_, installed = _SITE_PACKAGES.split(file)
    path = Path(installed)
    if installed != file:
        return path.as_posix()
    top = path.parent
    while top != top.parent and (top / "__init__.py").is_file():
        top = top.parent
    return path.relative_to(top).as_posix()


# ------------------------------------------------------------------ walks


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


def remove_dead(graph: fx.Graph) -> None:
    """Remove what no output and no write depends on: dropout, random numbers and capture's assertions have no other effect."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or writes_into_operand(node.target))
