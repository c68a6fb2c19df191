"""From a rewritten graph to a `forward` with the original's signature, shared by all sites of equal structure.

An fx.GraphModule makes a class of its own for every instance, and torch.compile would compile each block anew.
Here equal sites are instances over one function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from edit_compile.capture import Capture
from edit_compile.errors import RewriteError


def generate_forward(graph: fx.Graph, captured: Capture, module: nn.Module, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """A method for modules of this class: checks what the graph took as constant, then runs the graph.

    Args:
        arguments: those the site was captured with, by parameter name.
    """
    signature = inspect.signature(type(module).forward)
    outputs = pytree.tree_unflatten(list(graph.output_node().args[0]), captured.program.call_spec.out_spec)
    if type(outputs) not in (tuple, list, dict, fx.Node):
        raise RewriteError(
            f"{type(module).__name__} returns a {type(outputs).__name__}; a site must return tensors, tuples, lists or dicts"
        )
    graph.output_node().args = (outputs,)
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src.replace("def forward(", "def _run(", 1), f"<edit_compile {type(module).__name__}>", "exec"), scope)

    leaves = _access_paths(signature, arguments)
    checks = [_check(path, value) for path, value in leaves if not isinstance(value, Tensor)]
    untouched = [f"{name} is not None" for name in _left_out(signature, arguments)]
    scope |= {"_refuse": _refuse, "_defaults": {n: p.default for n, p in signature.parameters.items()}}
    body = [
        f"def forward({_declaration(signature)}):",
        "    if self.edit_runtime.teaching:",
        f"        return self.edit_teach({_forwarding(signature)})",
        "    edit_grid = self.edit_runtime.current_grid(self)",
        *(f"    if {c}: _refuse(self, {c!r})" for c in [*_missing(signature, arguments), *checks, *untouched]),
        f"    return _run(self, {', '.join([path for path, _ in leaves] + ['edit_grid'])})",
    ]
    exec(compile("\n".join(body), f"<edit_compile {type(module).__name__}.forward>", "exec"), scope)
    forward = scope["forward"]
    forward.__signature__ = signature
    return forward


def _declaration(signature: inspect.Signature) -> str:
    parts = []
    star = False
    for name, p in signature.parameters.items():
        if p.kind is p.VAR_POSITIONAL:
            star = True
            parts.append(f"*{name}")
        elif p.kind is p.VAR_KEYWORD:
            parts.append(f"**{name}")
        else:
            if p.kind is p.KEYWORD_ONLY and not star:
                star = True
                parts.append("*")
            parts.append(name if p.default is p.empty else f"{name}=_defaults[{name!r}]")
    return ", ".join(parts)


def _forwarding(signature: inspect.Signature) -> str:
    parameters = list(signature.parameters.items())[1:]
    return ", ".join(f"**{n}" if p.kind is p.VAR_KEYWORD else f"*{n}" if p.kind is p.VAR_POSITIONAL else f"{n}={n}" for n, p in parameters)


def _access_paths(signature: inspect.Signature, arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """For every leaf of the arguments, in the graph's order, the expression that reads it."""
    found = []
    for keys, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        name = keys[0].key  # type: ignore[attr-defined]
        root = _root(signature, name)
        found.append((root + "".join(str(pytree.keystr((key,))) for key in keys[1:]), leaf))
    return found


def _check(path: str, value: Any) -> str:
    if value is None:
        return f"{path} is not None"
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return f"{path} != {value!r}"
    return f"{path} is not {path}"  # an object: nothing to compare it by


def _missing(signature: inspect.Signature, arguments: Mapping[str, Any]) -> list[str]:
    """Nested arguments that the graph reads into: None would fail there without a word."""
    nested = [name for name, value in arguments.items() if isinstance(value, dict | list | tuple) and pytree.tree_leaves(value)]
    return [f"{_root(signature, name, optional=True)} is None" for name in nested]


def _root(signature: inspect.Signature, name: str, *, optional: bool = False) -> str:
    """The expression that reads an argument: a parameter, or an entry of the variable keyword parameter."""
    rest = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    if rest is None or (name in signature.parameters and name != rest):
        return name
    return f"{rest}.get({name!r})" if optional else f"{rest}[{name!r}]"


def _left_out(signature: inspect.Signature, arguments: Mapping[str, Any]) -> list[str]:
    parameters = list(signature.parameters.items())[1:]
    return [n for n, p in parameters if n not in arguments and p.default is None and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _refuse(site: nn.Module, condition: str) -> None:
    raise RewriteError(
        f"{site.edit_path}: was converted for inputs without this: {condition}. "
        "Convert again with example inputs that have it: linearize(model, example_inputs=dict(...))"
    )
