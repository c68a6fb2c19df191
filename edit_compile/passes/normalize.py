"""Normalize a site's graph: free it of what capture froze, which is assertions, dtypes, devices and lifted parameters.

The graph was captured in one dtype on the meta device. A cast to that dtype means "the input's dtype", a constant made on
the meta device means "the input's device"; any other cast, and any other device, is one the model means.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from edit_compile.passes.capture import PROBE_DTYPE, Capture
from edit_compile.passes.find_attention import is_linear, is_projection
from edit_compile.passes.graph_walk import module_calls, op_name, operand, remove_dead, upstream
from edit_compile.passes.site_graph import Refused

aten = torch.ops.aten
_CASTS = ("to", "_to_copy")
_COPIES_OF_CONSTANTS = (aten.clone.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)
MAX_NUMBERS = 4096  # in a tensor that a forward makes of plain numbers: more would make the source of its graph too long
_META_OF_CALL = ("val", "nn_module_stack", "stack_trace")


def normalize(captured: Capture, module: nn.Module, core: Iterable[fx.Node] = ()) -> fx.Graph:
    """Copy a site's graph with parameters by `get_attr` and the module's own submodules called where they can be.

    Args:
        core: nodes of the captured graph that must stay visible: no submodule around them is called as a whole, but that of
            a projection itself.

    Raises:
        Refused: the module reads a tensor that is none of its own: a global one, one in a list, or a large constant.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(captured.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = {key: old.meta[key] for key in _META_OF_CALL if key in old.meta}
        if old.op == "placeholder" and captured.source(old).kind != "input":
            name = captured.source(old).name
            constant = captured.program.constants.get(name)
            if not _is_attribute(module, name) and isinstance(constant, Tensor) and _made_in_forward(new, constant):
                _replace_with_values(new, constant, module)
            else:
                _replace_with_attribute(new, name, module)
    remove_dead(graph)
    recover_module_calls(graph, module, [mapping[node] for node in core])
    _differentiable_copies(graph)
    generalize_dtype_device(graph, captured.dtype)
    remove_dead(graph)
    graph.lint()
    return graph


def _differentiable_copies(graph: fx.Graph) -> None:
    """Replace `copy(y, x)`, which capture makes of `y[...] = x`, with x in the form of y: the operator has no derivative."""
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        written, value = node.args[:2]
        before, after = node.meta["val"], value.meta["val"] if isinstance(value, fx.Node) else None
        if not isinstance(after, Tensor):
            continue
        with graph.inserting_before(node):
            if tuple(map(str, before.shape)) != tuple(map(str, after.shape)):
                value = graph.call_function(aten.expand_as.default, (value, written))
                value.meta = dict(node.meta)
            if before.dtype != after.dtype:
                value = graph.call_function(aten.type_as.default, (value, written))
                value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _is_attribute(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return isinstance(getattr(module.get_submodule(owner), leaf), Tensor)
    except AttributeError:
        return False


def _made_in_forward(node: fx.Node, constant: Tensor) -> bool:
    """Say whether a constant is a tensor that the forward makes of plain numbers: capture copies these, and no others."""
    return not constant.is_meta and all(user.target in _COPIES_OF_CONSTANTS for user in node.users)


def _replace_with_values(node: fx.Node, constant: Tensor, module: nn.Module) -> None:
    """Have the graph make a constant of its numbers, as the module's forward does."""
    if constant.numel() > MAX_NUMBERS:
        told = f"makes a tensor of {constant.numel():,} plain numbers in its forward, and a site may of at most {MAX_NUMBERS:,}"
        raise Refused(f"{type(module).__name__} {told}; make it once and register it as a buffer", node)
    with node.graph.inserting_before(node):
        made = node.graph.call_function(torch.tensor, (constant.tolist(),), {"dtype": constant.dtype})
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _replace_with_attribute(node: fx.Node, name: str, module: nn.Module) -> None:
    if not _is_attribute(module, name):
        raise Refused(f"{type(module).__name__} reads a tensor in its forward that is not its own; register it as a buffer", node)
    with node.graph.inserting_before(node):
        attribute = node.graph.get_attr(name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    node.graph.erase_node(node)


def recover_module_calls(graph: fx.Graph, module: nn.Module, core: Iterable[fx.Node] = ()) -> None:
    """Turn the nodes of a submodule's forward back into a call of it, so that LoRA, quantization and hooks on it act.

    Done where the submodule maps one tensor to one tensor, for the outermost such module that leaves the core visible.
    """
    opened = {key for node in core for key in _opened(node)}
    groups: dict[str, list[fx.Node]] = {}
    paths: dict[str, str] = {}
    for node in graph.nodes:
        called = next(((key, path) for key, path in module_calls(node) if key not in opened), None)
        if called is not None and node.op == "call_function":
            groups.setdefault(called[0], []).append(node)
            paths[called[0]] = called[1]
    for key, nodes in groups.items():
        if _takes_one_argument(module.get_submodule(paths[key])):
            _recover(graph, paths[key], nodes)


def _opened(node: fx.Node) -> list[str]:
    """List the keys of the calls around a node of the core: all except a projection's own."""
    calls = [key for key, _ in module_calls(node)]
    return calls[:-1] if is_projection(node) else calls


def _takes_one_argument(module: nn.Module) -> bool:
    """Say whether a module's call takes a single argument: what else it was given would be lost with its nodes."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return bool(parameters) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters[1:])


def _recover(graph: fx.Graph, path: str, nodes: list[fx.Node]) -> None:
    """Replace the nodes of one call with the call, if they map one tensor to one."""
    inside = set(nodes)
    inputs = {i for n in nodes for i in n.all_input_nodes if i not in inside and i.op != "get_attr" and _is_tensor(i)}
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    if len(inputs) != 1 or len(outputs) != 1 or not _is_tensor(outputs[0]):
        return
    result = outputs[0]
    with graph.inserting_after(result):
        call = graph.call_module(path, (next(iter(inputs)),))
    call.meta = {**result.meta, "inside": nodes, "linear": is_linear(result), "projection": is_projection(result)}
    result.replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def generalize_dtype_device(graph: fx.Graph, dtype: torch.dtype = PROBE_DTYPE) -> None:
    """Replace the dtype and the device that a graph was captured in with those of an input."""
    reference = next((n for n in graph.nodes if n.op == "placeholder" and _is_tensor(n) and n.meta["val"].dtype is dtype), None)
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in _CASTS:
            _generalize_cast(node, reference, dtype)
        elif node.op == "call_function" and "device" in node.kwargs and reference is not None:
            _generalize_constant(node, reference, dtype)


def _generalize_cast(node: fx.Node, reference: fx.Node | None, dtype: torch.dtype) -> None:
    source, graph = operand(node, 0), node.graph
    value, source_value = node.meta["val"], source.meta["val"]
    new = source
    with graph.inserting_before(node):
        if value.device != source_value.device and (reference is not None or not value.is_meta):
            device = graph.call_function(getattr, (reference, "device")) if value.is_meta else value.device
            new = graph.call_function(torch.Tensor.to, (new, device))
            new.meta = {**node.meta, "val": source_value.to(value.device)}
        if value.dtype is not source_value.dtype:
            like = (_nearest_of_dtype(source, dtype) or reference) if value.dtype is dtype else None
            cast = (aten.type_as.default, (new, like)) if like is not None else (aten.to.dtype, (new, value.dtype))
            new = graph.call_function(*cast)
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _nearest_of_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    found = (at for at in upstream(node) if _is_tensor(at) and at.meta["val"].dtype is dtype and at.op != "get_attr")
    return next(found, None)


def _generalize_constant(node: fx.Node, reference: fx.Node, dtype: torch.dtype) -> None:
    changed = dict(node.kwargs)
    with node.graph.inserting_before(node):
        if torch.device(str(node.kwargs["device"] or "cpu")).type == "meta":
            changed["device"] = node.graph.call_function(getattr, (reference, "device"))
        if node.kwargs.get("dtype") is dtype:
            changed["dtype"] = node.graph.call_function(getattr, (reference, "dtype"))
    node.kwargs = changed
