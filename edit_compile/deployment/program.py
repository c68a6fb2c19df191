"""From a converted model to the graph that files of all formats are written from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from edit_compile.deployment.cases import GRID, Case, Varying, input_names, split_constants, tensors_of
from edit_compile.deployment.size_conditions import is_equation, size_name
from edit_compile.errors import ExportError, first_line
from edit_compile.passes.native_attention import native_attention
from edit_compile.student.handle import ConvertedModel
from edit_compile.student.runtime import Statement
from edit_compile.torch_internals import (
    broken_condition,
    drop_size_checks,
    eager_instead_of_compiled,
    equations_of_sizes,
    exporting_for_torch,
    size_expression,
)


class Deployed(nn.Module):
    """A converted model as a function of tensors: other arguments are fixed, and a grid may come as the shape of one more tensor."""

    def __init__(self, student: ConvertedModel, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.student, self.constants = student, dict(constants)

    def forward(self, **inputs: Any) -> tuple[Tensor, ...]:
        grid = inputs.pop(GRID, None)
        statement = Statement() if grid is None else Statement(grid=(grid,))
        with self.student.edit_conversion.runtime.stating(statement):
            output = self.student(**self.constants, **inputs)
        return tuple(tensors_of(output))


@dataclass(frozen=True)
class Program:
    """A graph, and what a call of it needs.

    Attributes:
        names: of its inputs, tensors all.
        constants: the arguments that are fixed in it.
        shapes: of each input; a number where it is fixed, otherwise what it varies with.
        most: of each input, the largest sizes of dimensions that have one.
        fixed: names of what was to vary and does not, and why.
        conditions: equations of sizes that it takes for granted, as `SizeConditions` reads them.
    """

    exported: ExportedProgram
    names: tuple[str, ...]
    constants: dict[str, Any]
    shapes: tuple[tuple[int | str, ...], ...]
    most: tuple[dict[int, int], ...]
    fixed: dict[str, str]
    conditions: tuple[str, ...]


def make_program(
    model: nn.Module,
    call: Mapping[str, Any],
    constants: Mapping[str, Any],
    varying: Varying,
    *,
    what: str,
    for_torch: bool,
    bounds: Mapping[tuple[int, int], int] | None = None,
    variants: Mapping[str, list[tuple[int, ...]]] | None = None,
) -> Program:
    """Capture a module that is called with tensors by name.

    Args:
        call: the tensors, in any nesting.
        constants: what the module has fixed, for the record.
        varying: the dimensions to keep open.
        what: it is, for errors.
        for_torch: torch will run the graph, with all of its kernels.
        bounds: the largest sizes of open dimensions; none where there is no limit.
        variants: other shapes of the tensors, by the name of what is other.

    Raises:
        ExportError: it cannot be captured.
    """
    tensors = tensors_of(call)
    dims = [_open(number, tensor, varying, bounds or {}) for number, tensor in enumerate(tensors)]
    waiting = iter(dims)
    dynamic = pytree.tree_map(lambda leaf: next(waiting) if isinstance(leaf, Tensor) else None, dict(call))
    try:
        with capturing_weights(model, for_torch=for_torch):
            exported = torch.export.export(model, (), dict(call), dynamic_shapes={"inputs": dynamic}, strict=False)
    except Exception as error:
        raise ExportError(f"{what} cannot be captured by torch.export: {type(error).__name__}: {first_line(error)}") from error
    drop_size_checks(exported)
    _drop_squeezes_of_nothing(exported)
    shapes, fixed = _shapes(exported, tensors, varying, variants or {})
    return Program(exported, tuple(input_names(call)), dict(constants), shapes, _most(exported), fixed, _conditions(exported))


def _open(number: int, tensor: Tensor, varying: Varying, bounds: Mapping[tuple[int, int], int]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for dim in range(tensor.ndim):
        if (number, dim) in varying:
            most = bounds.get((number, dim))
            found[dim] = Dim.AUTO if most is None else Dim.AUTO(min=1, max=most)
    return found


def _drop_squeezes_of_nothing(exported: ExportedProgram) -> None:
    """Take `squeeze` of dimensions that are not 1 out of a graph: torch does nothing there, and ONNX's operator fails."""
    graph = exported.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        squeezed = node.args[0]
        if squeezed.meta["val"].ndim == node.meta["val"].ndim and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(squeezed)
            graph.erase_node(node)
    graph.lint()
    exported.graph_module.recompile()


def _placeholders(exported: ExportedProgram) -> list[Any]:
    """List a graph's nodes of its inputs that are tensors."""
    inputs = [node for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs]
    return [node for node in inputs if isinstance(node.meta.get("val"), Tensor)]


def _most(exported: ExportedProgram) -> tuple[dict[int, int], ...]:
    """Find the largest sizes of open dimensions, where the graph has such."""
    ranges = {str(symbol): bounds.upper for symbol, bounds in exported.range_constraints.items()}
    found = []
    for node in _placeholders(exported):
        sizes = enumerate(node.meta["val"].shape)
        uppers = {dim: ranges.get(size_expression(size)) for dim, size in sizes if isinstance(size, torch.SymInt)}
        found.append({dim: int(upper) for dim, upper in uppers.items() if upper is not None and upper.is_Integer})
    return tuple(found)


def _conditions(exported: ExportedProgram) -> tuple[str, ...]:
    """List the equations of sizes that a graph takes for granted, as far as they can be read again."""
    written = equations_of_sizes([node.meta["val"] for node in _placeholders(exported)], size_name)
    return tuple(condition for condition in written if is_equation(condition))


def _shapes(
    exported: ExportedProgram, tensors: list[Tensor], varying: Varying, variants: Mapping[str, list[tuple[int, ...]]]
) -> tuple[tuple[tuple[int | str, ...], ...], dict[str, str]]:
    """Tell which dimensions of the inputs the graph left open, and why others are not."""
    placeholders = _placeholders(exported)
    values = {node.name: node.meta["val"] for node in placeholders}
    shapes = []
    fixed: dict[str, str] = {}
    for name in {name for names in varying.values() for name in names} & variants.keys():
        if (condition := broken_condition(values, variants[name])) is not None:
            fixed[name] = f"its graph holds only where {condition}"
    for number, (node, tensor) in enumerate(zip(placeholders, tensors, strict=True)):
        shape: list[int | str] = []
        for dim, size in enumerate(node.meta["val"].shape):
            names = varying.get((number, dim), ())
            is_open = isinstance(size, torch.SymInt) and not size_expression(size).isdigit()
            shape.append(" and ".join(names) if is_open else int(tensor.shape[dim]))
            if names and not is_open:
                fixed = dict.fromkeys(names, f"{node.name}.shape[{dim}] is always {tensor.shape[dim]}") | fixed
        shapes.append(tuple(shape))
    return tuple(shapes), fixed


@contextmanager
def capturing_weights(model: nn.Module, *, for_torch: bool) -> Iterator[None]:
    """Let torch.export capture a module with its weights inside: in evaluation mode, without gradients, quietly, as written."""
    modes = [(module, module.training) for module in model.modules()]
    logger = logging.getLogger("torch")
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(native_attention(model))
        stack.enter_context(eager_instead_of_compiled())
        stack.enter_context(exporting_for_torch() if for_torch else nullcontext())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.no_grad())
        warnings.simplefilter("ignore")
        try:
            logger.setLevel(logging.CRITICAL + 1)  # what fails is raised too
            model.eval()
            yield
        finally:
            logger.setLevel(level)
            for module, mode in modes:
                module.training = mode


def program_of(student: ConvertedModel, case: Case, varying: Varying, chosen: Collection[str], **options: Any) -> Program:
    """Capture a converted model.

    Args:
        chosen: names of what may vary.
        options: as for `make_program`.

    Raises:
        ExportError: it cannot be captured.
    """
    call, constants = split_constants(case.inputs)
    wanted = {place: names for place, names in varying.items() if any(name in chosen or name == "size" for name in names)}
    deployed = Deployed(student, constants)
    return make_program(deployed, call, constants, wanted, what=type(student).__name__, **options)


@torch.no_grad()
def call_case(student: ConvertedModel, case: Case) -> tuple[Tensor, ...]:
    """Run a converted model on a case, in evaluation mode as it is exported."""
    call, constants = split_constants(case.inputs)
    found: tuple[Tensor, ...] = Deployed(student, constants)(**call)
    return found
