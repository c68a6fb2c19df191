"""Capture: any `nn.Module` to an FX graph with symbolic sizes, without touching its weights.

What is captured is a meta copy: the same modules over meta tensors in bfloat16. It costs no memory, and the
dtype is a probe: a cast to float32 in the graph is then one the model means, and a cast to bfloat16 means "the
dtype of the input".
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from edit_compile.errors import CaptureError
from edit_compile.ir.plan import Refusal
from edit_compile.passes.graph_walk import path_in_package
from edit_compile.passes.native_attention import native_attention
from edit_compile.torch_internals import TORCH_FOLDER, drop_size_checks, writes_into_operand

PROBE_DTYPE = torch.bfloat16
_OWN_FOLDER = f"{Path(__file__).parent}{os.sep}"


@dataclass(frozen=True)
class Source:
    """Where a graph input comes from: `kind` is "input" (an argument of forward), "parameter", "buffer" or "constant"."""

    kind: str
    name: str


@dataclass(frozen=True)
class Capture:
    """A module's graph. `sources` tells for every placeholder where it comes from, by the name that it was captured under."""

    program: ExportedProgram
    sources: Mapping[str, Source]

    @property
    def graph(self) -> fx.Graph:
        """Return the program's graph."""
        graph: fx.Graph = self.program.graph_module.graph
        return graph

    def source(self, node: fx.Node) -> Source:
        """Return where a placeholder comes from."""
        return self.sources[str(node.target)]  # a copy of the graph may have renamed the node


def meta_copy(module: nn.Module, dtype: torch.dtype = PROBE_DTYPE) -> nn.Module:
    """Copy a module's structure over meta tensors: no weights, floating-point tensors in `dtype`, evaluation mode."""
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(module):
        memo[id(tensor)] = _meta(tensor, dtype)
    return copy.deepcopy(module, memo).eval()


def meta_inputs(inputs: Any, dtype: torch.dtype = PROBE_DTYPE) -> Any:
    """Copy example inputs, in any nesting, with their tensors on the meta device and floating-point ones in `dtype`."""
    return pytree.tree_map(lambda leaf: _meta(leaf, dtype) if isinstance(leaf, Tensor) else leaf, inputs)


def capture(module: nn.Module, inputs: Mapping[str, Any], *, functional: bool = False, cast: bool = True, symbolic: bool = True) -> Capture:
    """Capture `module(**inputs)`, every tensor dimension symbolic where the module allows it.

    Args:
        module: the module; it is read, never run or changed. Meta weights are fine.
        inputs: keyword arguments of one forward. Use batch 2 or more and sizes that differ from each other:
            size 1 and equal sizes merge in the graph.
        functional: replace writes into operands; only needed where the graph will be rewritten.
        cast: bring floating-point inputs to the probe dtype; not for what `call_arguments` has recorded, where a
            float32 tensor is one that the model means.
        symbolic: keep sizes open. Where only one size matters, False is many times faster on models with many guards.

    Raises:
        CaptureError: the module cannot be captured; says which op or line stands in the way.
    """
    structure = meta_copy(module)
    with native_attention():
        try:
            program = _export(structure, meta_inputs(dict(inputs)) if cast else dict(inputs), functional, symbolic)
        except Exception as error:
            raise CaptureError(_explanation(module, error)) from error
    return Capture(program, _sources(program))


def call_arguments(module: nn.Module, inputs: Mapping[str, Any], paths: set[str]) -> dict[str, dict[str, Any] | Refusal]:
    """Record what each submodule at `paths` receives when `module(**inputs)` runs: meta arguments by parameter name.

    A variable keyword parameter's content is merged in. A submodule called several times reports its first call; one whose
    arguments have no names, why it cannot be captured.
    """
    structure = meta_copy(module)
    received: dict[str, dict[str, Any] | Refusal] = {}

    def keep(path: str) -> Any:
        def hook(submodule: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                received.setdefault(path, bound_arguments(submodule, args, kwargs))
            except CaptureError as error:
                received.setdefault(path, Refusal(reason=f"{path}: {error}"))

        return hook

    for path in paths:
        structure.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True)
    with native_attention(), torch.no_grad():
        try:
            structure(**meta_inputs(dict(inputs)))
        except Exception as error:
            raise CaptureError(_explanation(module, error)) from error
    return received


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by parameter name, without those left at their defaults.

    Raises:
        CaptureError: one of them has no name.
    """
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(f"{type(module).__name__}.forward takes *{name}; give its arguments names")
        else:
            named[name] = value
    return named


def _export(structure: nn.Module, inputs: dict[str, Any], functional: bool, symbolic: bool) -> ExportedProgram:
    dynamic = pytree.tree_map(_all_dynamic, inputs) if symbolic else None
    with torch.no_grad(), _quiet():
        program: ExportedProgram = torch.export.export(structure, (), inputs, dynamic_shapes=dynamic, strict=False)
        if functional and any(writes_into_operand(node.target) for node in program.graph.nodes):
            drop_size_checks(program)
            program = program.run_decompositions({})
        return program


def _all_dynamic(leaf: Any) -> Any:
    return dict.fromkeys(range(leaf.ndim), Dim.AUTO) if isinstance(leaf, Tensor) else None


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor a module holds, also in plain attributes and in modules that are plain attributes, as teachers are."""
    pending, seen = [module], {module}
    while pending:
        for leaf in pytree.tree_leaves(vars(pending.pop())):
            if isinstance(leaf, Tensor):
                yield leaf
            elif isinstance(leaf, nn.Module) and leaf not in seen:
                seen.add(leaf)
                pending.append(leaf)


def _meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=kept, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _sources(program: ExportedProgram) -> dict[str, Source]:
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.USER_INPUT: "input"}
    sources = {}
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        sources[name] = Source(kinds.get(spec.kind, "constant"), spec.target or name)
    return sources


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence export inside: it warns and logs about its own internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # what fails is raised too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _explanation(module: nn.Module, error: Exception) -> str:
    frame = _innermost_user_frame(error)
    where = f" at {frame}" if frame else ""
    return (
        f"{type(module).__name__} cannot be captured{where}: {type(error).__name__}: {_first_line(error)} "
        "If a value decides the control flow there, make it an attribute fixed at construction; if the inputs are wrong, "
        "pass example_inputs=dict(...) or record them with edit_compile.record(pipe, ...)."
    )


def what_failed(error: Exception) -> str:
    """Describe an exception of somebody else's code in one line: its type, the first line of what it says, and where it was raised."""
    frame = _innermost_user_frame(error)
    return f"{type(error).__name__}: {_first_line(error)}" + (f" at {frame}" if frame else "")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _innermost_user_frame(error: Exception) -> str | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((TORCH_FOLDER, _OWN_FOLDER))]
    return f"{path_in_package(frames[-1].filename)}:{frames[-1].lineno} ({frames[-1].line})" if frames else None
