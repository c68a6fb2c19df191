"""From a rewritten graph to a `forward` with the original's signature, shared by all sites of equal structure.

An fx.GraphModule makes a class of its own for every instance, and torch.compile would compile each block anew.
Here equal sites are instances over one function.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from edit_compile.errors import RewriteError
from edit_compile.passes.capture import Capture
from edit_compile.passes.site_graph import Refused

_numbers = itertools.count()  # of generated sources: their names must differ


def generate_forward(graph: fx.Graph, captured: Capture, module: nn.Module, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Generate a method for modules of this class: checks what the graph took as constant, then runs the graph.

    Args:
        graph: its last placeholder is the grid.
        arguments: those the site was captured with, by parameter name.

    Raises:
        Refused: the module returns what a graph cannot.
    """
    signature, name = inspect.signature(type(module).forward), type(module).__name__
    outputs = pytree.tree_unflatten(list(graph.output_node().args[0]), captured.program.call_spec.out_spec)
    for kind in _kinds(outputs):
        if kind not in (tuple, list, dict, fx.Node, type(None)):
            raise Refused(f"{name} returns a {kind.__name__}; a site must return tensors, tuples, lists or dicts")
    graph.output_node().args = (outputs,)
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    _execute(code.src.replace("def forward(", "def _run(", 1), f"<edit_compile graph of {name} {next(_numbers)}>", scope)
    scope |= {"_refuse": _refuse, "_has_others": _has_others, "_defaults": {n: p.default for n, p in signature.parameters.items()}}
    _execute(_method(signature, arguments), f"<edit_compile forward of {name} {next(_numbers)}>", scope)
    forward: Callable[..., Any] = scope["forward"]
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _method(signature: inspect.Signature, arguments: Mapping[str, Any]) -> str:
    """The source of the method. The receiver is called as in the module's own forward."""
    leaves, me = _access_paths(signature, arguments), next(iter(signature.parameters))
    checks = [_check(path, value) for path, value in leaves if not isinstance(value, Tensor)]
    refused = _missing(signature, arguments) | {c: c for c in [*checks, *_left_out(signature, arguments)]} | _others(signature, arguments)
    lines = [
        f"def forward({_declaration(signature)}):",
        f"    if {me}.edit_teacher_is_on():",
        f"        return {me}.edit_teacher_forward({_forwarding(signature)})",
        f"    _edit_grid = {me}.edit_current_grid()",
        *(f"    if {condition}: _refuse({me}, {words!r})" for condition, words in refused.items()),
        f"    return _run({me}, {', '.join([path for path, _ in leaves] + ['_edit_grid'])})",
    ]
    return "\n".join(lines)


def _execute(source: str, file: str, scope: dict[str, Any]) -> None:
    """Run generated source; tracebacks and debuggers find its lines."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), scope)


def _kinds(outputs: Any) -> Iterator[type]:
    """The types of a nesting of results."""
    yield type(outputs)
    if type(outputs) in (tuple, list, dict):
        for inner in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _kinds(inner)


def _declaration(signature: inspect.Signature) -> str:
    parts = []
    star, slash = False, False
    for name, p in signature.parameters.items():
        if slash and p.kind is not p.POSITIONAL_ONLY:
            parts.append("/")
        slash = p.kind is p.POSITIONAL_ONLY
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
    return ", ".join([*parts, "/"] if slash else parts)


def _forwarding(signature: inspect.Signature) -> str:
    parameters = list(signature.parameters.items())[1:]
    form: dict[Any, str] = {
        inspect.Parameter.VAR_KEYWORD: "**{0}",
        inspect.Parameter.VAR_POSITIONAL: "*{0}",
        inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    }
    return ", ".join(form.get(p.kind, "{0}").format(n) for n, p in parameters)


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


def _missing(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Arguments that the graph reads into: there, their absence would be an error without a word.

    Conditions, and how each is put in words, as in what follows.
    """
    rest = _rest(signature)
    absent = [f"{name!r} not in {rest}" for name in arguments if rest and (name not in signature.parameters or name == rest)]
    nested = [name for name, value in arguments.items() if isinstance(value, dict | list | tuple) and pytree.tree_leaves(value)]
    return {c: c for c in [*absent, *(f"{_root(signature, name)} is None" for name in nested)]}


def _others(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What variable parameters bring that the graph does not have."""
    kinds = {p.kind: name for name, p in signature.parameters.items()}
    found = {}
    if place := kinds.get(inspect.Parameter.VAR_POSITIONAL):
        found[f"len({place}) > 0"] = f"len({place}) > 0"
    if rest := _rest(signature):
        known = tuple(name for name in arguments if name not in signature.parameters or name == rest)
        found[f"_has_others({rest}, {known!r})"] = f"{rest} has others than {', '.join(known) or '(none)'}"
    return found


def _has_others(given: Mapping[str, Any], known: tuple[str, ...]) -> bool:
    return any(value is not None and name not in known for name, value in given.items())


def _rest(signature: inspect.Signature) -> str | None:
    return next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)


def _root(signature: inspect.Signature, name: str) -> str:
    """The expression that reads an argument: a parameter, or an entry of the variable keyword parameter."""
    rest = _rest(signature)
    return name if rest is None or (name in signature.parameters and name != rest) else f"{rest}[{name!r}]"


def _left_out(signature: inspect.Signature, arguments: Mapping[str, Any]) -> list[str]:
    """Parameters that were left at their defaults: conditions for their being something else."""
    parameters = list(signature.parameters.items())[1:]
    left_out = [(n, p.default) for n, p in parameters if n not in arguments and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [_check(name, default) for name, default in left_out if default is not inspect.Parameter.empty]


def _refuse(site: nn.Module, condition: str) -> None:
    raise RewriteError(
        f"{site.edit_path}: was converted for inputs without this: {condition}. "
        "Convert again with example inputs that have it: linearize(model, example_inputs=dict(...))"
    )
