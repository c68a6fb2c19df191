"""Free a site's graph of what capture froze: assertions, dtypes, devices, and lifted parameters.

The graph was captured in the probe dtype on the meta device. A cast to the probe dtype means "the input's dtype",
a constant made on the meta device means "the input's device"; any other cast is one the model means.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, fx, nn

from edit_compile.errors import RewriteError
from edit_compile.passes.capture import PROBE_DTYPE, Capture
from edit_compile.passes.find_attention import LINEARS, SDPA

aten = torch.ops.aten
_CASTS = ("to", "_to_copy")
_META_OF_CALL = ("val", "nn_module_stack")


def clean(captured: Capture, module: nn.Module) -> fx.Graph:
    """A copy of the site's graph: parameters by `get_attr`, the module's own submodules called where they can be."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(captured.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = {key: old.meta[key] for key in _META_OF_CALL if key in old.meta}
        if old.op == "placeholder" and captured.source(old).kind != "input":
            _replace_by_attribute(new, captured.source(old).name, module)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    remove_dead(graph)
    raise_modules(graph, module)
    free_dtypes_and_devices(graph)
    remove_dead(graph)
    graph.lint()
    return graph


def _replace_by_attribute(node: fx.Node, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    try:
        found = isinstance(getattr(module.get_submodule(owner), leaf), Tensor)
    except AttributeError:
        found = False
    if not found:
        raise RewriteError(f"{type(module).__name__} makes a tensor constant {name!r} in its forward; register it as a buffer")
    with node.graph.inserting_before(node):
        attribute = node.graph.get_attr(name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    node.graph.erase_node(node)


def raise_modules(graph: fx.Graph, module: nn.Module) -> None:
    """Turn the nodes of a submodule's forward back into a call of it, so that LoRA, quantization and hooks on it act.

    Done where the submodule maps one tensor to one tensor and runs no attention.
    """
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        called = _called_below_root(node)
        if called is not None and node.op == "call_function":
            groups.setdefault(called[0], []).append(node)
    for nodes in groups.values():
        path = _called_below_root(nodes[0])[1]
        if _takes_one_argument(module.get_submodule(path)):
            _raise(graph, path, nodes)


def _called_below_root(node: fx.Node) -> tuple[str, str] | None:
    """Key and path of the outermost submodule call a node belongs to."""
    stack = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items() if path]
    return stack[0] if stack and "_empty_nn_module_stack" not in stack[0][1] else None


def _takes_one_argument(module: nn.Module) -> bool:
    """Whether a call has nothing but a tensor to say: what else it was given would be lost with the nodes."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return bool(parameters) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters[1:])


def _raise(graph: fx.Graph, path: str, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    if any(n.target is SDPA for n in nodes):
        return
    inputs = {i for n in nodes for i in n.all_input_nodes if i not in inside and i.op != "get_attr" and _is_tensor(i)}
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    if len(inputs) != 1 or len(outputs) != 1 or not _is_tensor(outputs[0]):
        return
    result = outputs[0]
    with graph.inserting_after(result):
        call = graph.call_module(path, (next(iter(inputs)),))
    call.meta = {**result.meta, "inside": nodes, "linear": result.target in LINEARS}
    result.replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def free_dtypes_and_devices(graph: fx.Graph) -> None:
    reference = next((n for n in graph.nodes if n.op == "placeholder" and _is_tensor(n) and n.meta["val"].dtype is PROBE_DTYPE), None)
    for node in list(graph.nodes):
        if node.op != "call_function" or not hasattr(node.target, "_opname"):
            continue
        if node.target._opname in _CASTS:
            _free_cast(node, reference)
        elif "device" in node.kwargs:
            _free_constant(node, reference)


def _free_cast(node: fx.Node, reference: fx.Node | None) -> None:
    source, graph = node.args[0], node.graph
    assert isinstance(source, fx.Node)
    dtype = node.meta["val"].dtype
    if dtype is source.meta["val"].dtype:
        node.replace_all_uses_with(source)
        return
    with graph.inserting_before(node):
        like = (_nearest_in_probe_dtype(source) or reference) if dtype is PROBE_DTYPE else None
        if like is not None:
            new = graph.call_function(aten.type_as.default, (source, like))
        else:
            new = graph.call_function(aten.to.dtype, (source, dtype))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _nearest_in_probe_dtype(node: fx.Node) -> fx.Node | None:
    pending, seen = [node], {node}
    while pending:
        at = pending.pop(0)
        if _is_tensor(at) and at.meta["val"].dtype is PROBE_DTYPE and at.op != "get_attr":
            return at
        for operand in at.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return None


def _free_constant(node: fx.Node, reference: fx.Node | None) -> None:
    if reference is None:
        return
    with node.graph.inserting_before(node):
        device = node.graph.call_function(getattr, (reference, "device"))
        changed = {**node.kwargs, "device": device}
        if node.kwargs.get("dtype") is PROBE_DTYPE:
            changed["dtype"] = node.graph.call_function(getattr, (reference, "dtype"))
    node.kwargs = changed


def remove_dead(graph: fx.Graph) -> None:
    """Dead code elimination; a site's graph has no owning module and nothing in it has effects."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
