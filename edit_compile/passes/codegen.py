"""Generate the forward of a rewritten site: the original's signature and the graph, with checks that the graph is valid.

An fx.GraphModule makes a class of its own for every instance, and torch.compile would compile each block anew.
Here equal sites are instances over one function.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from edit_compile.errors import RewriteError
from edit_compile.passes.axes.algebra import expression
from edit_compile.passes.capture import Capture
from edit_compile.passes.graph_walk import argument
from edit_compile.passes.site_graph import Refused
from edit_compile.torch_internals import conditions_on

_numbers = itertools.count()  # of generated sources: their names must differ

_FORWARD = """\
def forward({declaration}):
    if {receiver}.edit_teacher_is_on():
        return {receiver}.edit_teacher_forward({forwarding})
    _edit_grid = {receiver}.edit_current_grid()
{checks}
    return _run({receiver}, {leaves}, _edit_grid)
"""
_CHECK = "    if {condition}: _refuse({receiver}, {words!r})"


def generate_forward(graph: fx.Graph, captured: Capture, module: nn.Module, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Generate a method for modules of this class: checks what the graph took as constant, then runs the graph.

    Args:
        graph: its last placeholder is the grid.
        arguments: those the site was captured with, by parameter name.

    Raises:
        Refused: the module returns what a graph cannot.

    Returns:
        The method; its attribute `called` names the submodules that it calls.
    """
    contract, name = (
        InputContract(inspect.signature(type(module).forward), arguments, tuple(_inputs(graph, captured))),
        type(module).__name__,
    )
    _nest_outputs(graph, captured, name)
    _read_sizes_by_method(graph)
    code = graph.python_code("self")
    run = code.src.replace("def forward(", "def _run(", 1)
    defaults = {name: p.default for name, p in contract.signature.parameters.items()}
    scope = {**code.globals, "_refuse": _refuse, "_has_others": _has_others, "_defaults": defaults}
    _execute(f"{run.strip()}\n\n\n{contract.method()}", f"<edit_compile forward of {name} {next(_numbers)}>", scope)
    forward: Callable[..., Any] = scope["forward"]
    vars(forward).update(__signature__=contract.signature, called=_called(graph))
    return forward


def _called(graph: fx.Graph) -> frozenset[str]:
    """Name the submodules that a graph calls."""
    calls = (node for node in graph.nodes if node.op == "call_module" or (node.op == "get_attr" and "val" not in node.meta))
    return frozenset(str(node.target) for node in calls)


def _inputs(graph: fx.Graph, captured: Capture) -> Iterator[fx.Node]:
    """Yield the graph's inputs, in the order of the arguments' leaves."""
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target) in captured.sources and captured.source(node).kind == "input":
            yield node


def _read_sizes_by_method(graph: fx.Graph) -> None:
    """Read sizes with `Tensor.size`, which `torch.func.vmap` knows; it has no rule for the operator that export notes."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_method("size", node.args))
        graph.erase_node(node)


def _nest_outputs(graph: fx.Graph, captured: Capture, name: str) -> None:
    """Have the graph return its results nested as the module of this name does."""
    output = graph.output_node()
    nested = pytree.tree_unflatten(argument(output, 0, "results"), captured.program.call_spec.out_spec)
    for kind in _kinds(nested):
        if kind not in (tuple, list, dict, fx.Node, type(None)):
            raise Refused(f"{name} returns a {kind.__name__}; a site must return tensors, tuples, lists or dicts")
    output.args = (nested,)


def _kinds(nested: Any) -> Iterator[type]:
    """Yield the types of a nesting and of everything in it."""
    yield type(nested)
    if type(nested) in (tuple, list, dict):
        for inner in nested.values() if isinstance(nested, dict) else nested:
            yield from _kinds(inner)


def _execute(source: str, file: str, scope: dict[str, Any]) -> None:
    """Run generated source; tracebacks and debuggers find its lines."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), scope)


class _Code(str):
    """An expression in generated source: its representation is the text itself."""

    __slots__ = ()
    __repr__ = str.__str__


@dataclass(frozen=True)
class _Leaf:
    """A leaf of a site's arguments.

    Attributes:
        code: the expression that reads it.
        value: what it was captured with.
        node: the graph's input for it.
    """

    code: str
    value: Any
    node: fx.Node

    @property
    def open(self) -> bool:
        """Say whether it is a number that the graph takes as it comes, like a size."""
        size = self.node.meta.get("val")
        return isinstance(size, torch.SymInt) and not expression(size).isdigit()

    @property
    def fixed(self) -> bool:
        """Say whether a call must have what it was captured with."""
        return _comparable(self.value) and not self.open

    @property
    def read(self) -> bool:
        """Say whether a call must have it."""
        return bool(self.node.users)


@dataclass(frozen=True)
class InputContract:
    """What a generated forward takes: all that the original's takes, if it agrees with what the graph took as constant.

    Attributes:
        signature: of the original's forward, receiver included.
        arguments: those it was captured with, by parameter name; those of a variable keyword parameter among them.
        inputs: the graph's input for each leaf of the arguments, in order.
    """

    signature: inspect.Signature
    arguments: Mapping[str, Any]
    inputs: tuple[fx.Node, ...]

    def method(self) -> str:
        """Write the method's source."""
        receiver = next(iter(self.signature.parameters))  # called as in the module's own forward
        return _FORWARD.format(
            receiver=receiver,
            declaration=self._declaration(),
            forwarding=self._forwarding(),
            checks="\n".join(_CHECK.format(receiver=receiver, condition=code, words=words) for code, words in self.checks().items()),
            leaves=", ".join(leaf.code if leaf.read else "None" for leaf in self.leaves()),
        )

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """Return the parameters behind the receiver."""
        return list(self.signature.parameters.values())[1:]

    @property
    def rest(self) -> str | None:
        """Return the name of the variable keyword parameter, if there is one."""
        return next((p.name for p in self.parameters if p.kind is p.VAR_KEYWORD), None)

    def in_rest(self, name: str) -> bool:
        """Say whether an argument comes in the variable keyword parameter."""
        return self.rest is not None and (name not in self.signature.parameters or name == self.rest)

    def read(self, name: str) -> str:
        """Write the expression that reads an argument: a parameter, or an entry of the variable keyword parameter."""
        return f"{self.rest}[{name!r}]" if self.in_rest(name) else name

    def leaves(self) -> list[_Leaf]:
        """List the leaves of the arguments, in the graph's order."""
        readings = [
            (self.read(name) + pytree.keystr(keys), leaf)
            for name, value in self.arguments.items()
            for keys, leaf in pytree.tree_flatten_with_path(value)[0]
        ]
        return [_Leaf(code, value, node) for (code, value), node in zip(readings, self.inputs, strict=True)]

    def checks(self) -> dict[str, str]:
        """List the conditions under which a call is refused, and each in words, in the order in which they are tested.

        What the graph reads into comes first: later conditions read into it too. Numbers that the graph has open, as it has
        sizes, are held to what the module's own forward asked of them, and to nothing else.
        """
        leaves = self.leaves()
        needed = [leaf.code for leaf in leaves if leaf.read or leaf.fixed]
        nested = [name for name, value in self.arguments.items() if isinstance(value, dict | list | tuple)]
        left_out = [p for p in self.parameters if p.name not in self.arguments and p.default is not p.empty]
        open_numbers = {leaf.code: leaf.node.meta["val"] for leaf in leaves if leaf.open}
        same_as_code = [
            *(f"{name!r} not in {self.rest}" for name in self.arguments if self.in_rest(name)),
            *(f"{self.read(name)} is None" for name in nested if any(code.startswith(f"{self.read(name)}[") for code in needed)),
            *(_differs(leaf.code, leaf.value) for leaf in leaves if leaf.fixed),
            *(f"not {condition}" if condition.isidentifier() else f"not ({condition})" for condition in conditions_on(open_numbers)),
            *(_differs(p.name, p.default) for p in left_out if _comparable(p.default)),
        ]
        missing = [f"{leaf.code} is None" for leaf in leaves if leaf.read and isinstance(leaf.value, torch.Tensor)]
        known, needed_tensors = ({code: code for code in codes} for codes in (same_as_code, missing))
        return known | self._surplus() | needed_tensors | self._dimensions() | self._fixed_sizes()

    def _dimensions(self) -> dict[str, str]:
        """List the conditions for the number of dimensions, by which a module's own forward may go another way."""
        captured = [(leaf.code, leaf.node.meta.get("val")) for leaf in self.leaves() if leaf.read]
        conditions = [f"{code}.ndim != {value.ndim}" for code, value in captured if isinstance(value, torch.Tensor)]
        return {condition: condition for condition in conditions}

    def _fixed_sizes(self) -> dict[str, str]:
        """List the conditions for sizes that are numbers in the graph: channels, and what the module needs as a plain number."""
        return {
            f"{leaf.code}.shape[{dim}] != {size}": f"{leaf.code}.shape[{dim}] != {size}, the only size that its graph holds for"
            for leaf in self.leaves()
            if leaf.read and isinstance(leaf.node.meta.get("val"), torch.Tensor)
            for dim, size in enumerate(leaf.node.meta["val"].shape)
            if expression(size).isdigit() and int(expression(size)) > 1
        }

    def _surplus(self) -> dict[str, str]:
        """List the conditions for variable parameters that bring more than the graph has."""
        counts = {p.name: len(self.arguments.get(p.name, ())) for p in self.parameters if p.kind is p.VAR_POSITIONAL}
        conditions = [f"len({name}) {f'!= {count}' if count else '> 0'}" for name, count in counts.items()]
        found = {condition: condition for condition in conditions}
        if self.rest is not None:
            known = tuple(name for name in self.arguments if self.in_rest(name))
            found[f"_has_others({self.rest}, {known!r})"] = f"{self.rest} has others than {', '.join(known) or '(none)'}"
        return found

    def _declaration(self) -> str:
        """Write the parameters as the original has them, with defaults looked up by name."""
        written = [
            p.replace(annotation=p.empty, default=p.default if p.default is p.empty else _Code(f"_defaults[{p.name!r}]"))
            for p in self.signature.parameters.values()
        ]
        return str(inspect.Signature(written))[1:-1]

    def _forwarding(self) -> str:
        """Write the arguments of a call that passes all parameters on."""
        forms: dict[Any, str] = {
            inspect.Parameter.VAR_KEYWORD: "**{0}",
            inspect.Parameter.VAR_POSITIONAL: "*{0}",
            inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
        }
        return ", ".join(forms.get(p.kind, "{0}").format(p.name) for p in self.parameters)


def _comparable(value: Any) -> bool:
    """Say whether a call's value can be told from the one at capture; tensors vary, and other objects have nothing to compare."""
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def _differs(code: str, value: Any) -> str:
    """Write the condition under which an expression is not what it was at capture."""
    return f"{code} is not None" if value is None else f"{code} != {value!r}"


def _has_others(given: Mapping[str, Any], known: tuple[str, ...]) -> bool:
    return any(value is not None and name not in known for name, value in given.items())


def _refuse(site: nn.Module, condition: str) -> None:
    raise RewriteError(
        f"{site.edit_path}: was converted for inputs without this: {condition}. "
        "Convert again with example inputs that have it: linearize(model, example_inputs=dict(...))"
    )
