"""What this package uses of torch beyond its public interface: one function each, checked on torch 2.11 and 2.14.

pyproject.toml pins torch below the first version on which they have not been checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

TRACES_CONTEXT_VARIABLES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # torch.compile follows `ContextVar.get`
TORCH_FOLDER = f"{Path(torch.__file__).parent}{os.sep}"  # the names of torch's own files begin with it
NO_BACKWARD = -1  # what `backward_id` gives outside a backward pass
ROOT_CALL = "_empty_nn_module_stack"  # the path that export notes for operations in no module's forward


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, as under FSDP2 (whose module is not imported for the question: it loads torch's compiler)."""
    return hasattr(tensor, "device_mesh")


def mark_dynamic(tensor: Tensor) -> None:
    """Keep all of a tensor's sizes symbolic from the first graph on, without an error where they cannot be; only if dynamo is loaded."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))


def backward_id() -> int:
    """Tell the number of the backward pass that is running in this thread, `NO_BACKWARD` if none is. Nested ones have their own."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Call a function when the running backward pass has ended; never, if it fails."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def change_count(tensor: Tensor) -> int | None:
    """Count how often a tensor was written to; None for tensors of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def lerp_all_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move tensors towards others in place: tensor + weight * (end - tensor)."""
    torch._foreach_lerp_(tensors, ends, weight)


@contextmanager
def recompile_limit(graphs: int) -> Iterator[None]:
    """Let torch.compile keep up to `graphs` graphs of one function inside."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=graphs):
        yield


def drop_size_checks(program: ExportedProgram) -> None:
    """Drop the checks of example sizes that export adds to the module it decomposes: they refer to names it does not define."""
    program._guards_code = []


def size_hint(size: torch.SymInt) -> int:
    """Return the value that a symbolic size has in the example that was captured."""
    hint: Any = size.node.hint
    return int(hint)


def size_expression(size: torch.SymInt) -> str:
    """Return a symbolic size as an expression in the symbols of a captured graph."""
    return str(size.node.expr)


def writes_into_operand(target: object) -> bool:
    """Say whether an operator of a graph writes into one of its operands."""
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))
