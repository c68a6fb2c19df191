"""Capture: any `nn.Module` to an FX graph with symbolic sizes, without touching its weights.

What is captured is a meta copy: the same modules over meta tensors in bfloat16. It costs no memory, and the
dtype is a probe: a cast to float32 in the graph is then one the model means, and a cast to bfloat16 means "the
dtype of the input". A model that cannot run so, or runs other functions than in its own dtypes, is captured in its own.

Sizes are symbolic where they can be. What comes of those that cannot:

- Python or numpy may want some of them as plain numbers (`hash`, `int`): these are the example's, the others stay open;
- where the capture fails, or its symbolic analysis takes all its time, all are the example's (`Capture.symbolic` is False).

Either way `Capture.fixed` tells that numbers in the graph may stand for sizes. A site's forward is then held to the example's
sizes (`size_conditions`); what sizes of the whole model's graph are in terms of the inputs, `relate_sizes` finds out.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from edit_compile.errors import CaptureError, first_line
from edit_compile.ir.plan import Refusal
from edit_compile.passes.capture_context import Relaxed, capturing, functions_called, one_at_a_time
from edit_compile.passes.graph_walk import path_in_package
from edit_compile.passes.time_limit import OutOfTime, watched
from edit_compile.torch_internals import THIS_FILE, TORCH_FOLDER, drop_size_checks, known_size, open_compiled_modules, writes_into_operand

log = logging.getLogger(__name__)

PROBE_DTYPE = torch.bfloat16
SECONDS, MODULES_PER_SECOND = 12.0, 40  # of computing, for the symbolic analysis of a module, and more for what it is made of
_UNHASHABLE = "unhashable type: non-nested SymInt"
_OWN_FOLDER = f"{Path(__file__).parent}{os.sep}"


@dataclass(frozen=True)
class Source:
    """Where a graph input comes from: `kind` is "input" (an argument of forward), "parameter", "buffer" or "constant".

    The name of an input is how a call reads it: `x`, `pictures[0]`, `shapes[0][1]`.
    """

    kind: str
    name: str


@dataclass(frozen=True)
class Capture:
    """A module's graph.

    Attributes:
        sources: where every placeholder comes from, by the name that it was captured under.
        dtype: what stands for "the dtype of the input" in the graph.
        probe: what floating-point tensors were brought to; None if they were left in their own dtypes.
        inputs: those that were captured.
        symbolic: whether sizes were open at all; if not, every size in the graph is the example's.
        fixed: whether sizes may have become numbers on the way.
    """

    program: ExportedProgram
    sources: Mapping[str, Source]
    dtype: torch.dtype = PROBE_DTYPE
    probe: torch.dtype | None = PROBE_DTYPE
    inputs: Mapping[str, Any] = field(default_factory=dict)
    symbolic: bool = True
    fixed: bool = False

    @property
    def graph(self) -> fx.Graph:
        """Return the program's graph."""
        graph: fx.Graph = self.program.graph_module.graph
        return graph

    def source(self, node: fx.Node) -> Source:
        """Return where a placeholder comes from."""
        return self.sources[str(node.target)]  # a copy of the graph may have renamed the node


def meta_copy(module: nn.Module, dtype: torch.dtype | None = PROBE_DTYPE) -> nn.Module:
    """Copy a module's structure over meta tensors: no weights, floating-point tensors in `dtype` (None: as they are), evaluation mode."""
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(module):
        memo[id(tensor)] = _meta(tensor, dtype)
    copied = copy.deepcopy(module, memo)
    open_compiled_modules(copied)
    copied.eval()  # a `train` of the model's own may return nothing
    return copied


def meta_inputs(inputs: Any, dtype: torch.dtype | None = PROBE_DTYPE) -> Any:
    """Copy example inputs, in any nesting, with their tensors on the meta device and floating-point ones in `dtype`."""
    return pytree.tree_map(lambda leaf: _meta(leaf, dtype) if isinstance(leaf, Tensor) else leaf, inputs)


def capture(
    module: nn.Module,
    inputs: Mapping[str, Any],
    *,
    functional: bool = False,
    cast: bool = True,
    symbolic: bool = True,
    probes: tuple[torch.dtype | None, ...] | None = None,
    limit: float | None = None,
) -> Capture:
    """Capture `module(**inputs)`, every tensor dimension symbolic where the module allows it.

    Args:
        module: the module; it is read, never run or changed. Meta weights are fine.
        inputs: keyword arguments of one forward. Use batch 2 or more and sizes that differ from each other:
            size 1 and equal sizes merge in the graph.
        functional: replace writes into operands; only needed where the graph will be rewritten.
        cast: bring floating-point inputs to the probe's dtype; not for what `call_arguments` has recorded, where a
            float32 tensor is one that the model means.
        symbolic: keep sizes open. Where only one size matters, False is many times faster on models with many guards.
        probes: dtypes to try, in order, None for the module's own; found out if left out.
        limit: for symbolic analysis, in seconds of computing; by the number of its modules if left out.

    Raises:
        CaptureError: the module cannot be captured; says which op or line stands in the way.
    """
    tried = probes or (probe_dtypes(module, inputs) if cast else (PROBE_DTYPE,))
    attempts = [_Attempt(module, inputs, functional, meta_inputs if cast else None, probe) for probe in tried]
    return _first_that_works(attempts, symbolic, limit)


def _first_that_works(attempts: Sequence[_Attempt], symbolic: bool, limit: float | None = None) -> Capture:
    module = attempts[0].module
    seconds = limit or SECONDS + len(list(module.modules())) / MODULES_PER_SECOND
    told: dict[torch.dtype | None, Exception] = {}
    for open_sizes in (True, False) if symbolic else (False,):
        errors: dict[torch.dtype | None, Exception] = {}
        for attempt in _with_one_device_after(attempts, errors):
            try:
                return _captured(attempt, open_sizes, seconds)
            except OutOfTime:
                log.warning("%s: its symbolic analysis takes too long; the sizes of the example are taken as they are", _name(module))
                break
            except Exception as error:
                errors.setdefault(attempt.probe, error)
        # what stands in the way though sizes are plain, unless it is a size of data, of which the open ones tell more
        told |= {probe: error for probe, error in errors.items() if probe not in told or _UNHASHABLE not in str(error)}
    raise _capture_error(module, told)


def _with_one_device_after(attempts: Sequence[_Attempt], errors: Mapping[torch.dtype | None, Exception]) -> Iterator[_Attempt]:
    """Yield the attempts; behind each that has met tensors on the CPU, the same with all on one device."""
    for attempt in attempts:
        yield attempt
        if attempt.probe in errors and _two_devices(errors[attempt.probe]):
            yield replace(attempt, one_device=True)


def _two_devices(error: Exception) -> bool:
    """Say whether an error is that tensors of the CPU meet those of the meta device."""
    return all(word in str(error) for word in ("device", "meta", "cpu"))


@dataclass(frozen=True)
class _Attempt:
    """One way to capture a module: see `capture`."""

    module: nn.Module
    inputs: Mapping[str, Any]
    functional: bool
    cast: Callable[[Any, torch.dtype | None], Any] | None
    probe: torch.dtype | None
    one_device: bool = False

    def given(self) -> dict[str, Any]:
        """Return the arguments, tensors of their own: export leaves marks of open sizes on what it is given."""
        given = dict(self.inputs) if self.cast is None else self.cast(dict(self.inputs), self.probe)
        tensors = {id(leaf): leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)}
        fresh = {key: _unmarked(tensor) for key, tensor in tensors.items()}  # one that is given twice stays one
        copied: dict[str, Any] = pytree.tree_map(lambda leaf: fresh.get(id(leaf), leaf), given)
        return copied

    def export(self, relaxed: Relaxed | None) -> ExportedProgram:
        """Export once; sizes are open unless `relaxed` is None."""
        with capturing(self.module, relaxed, one_device=self.one_device):
            return _export(meta_copy(self.module, self.probe), self.given(), self.functional, relaxed is not None)


def _captured(attempt: _Attempt, open_sizes: bool, limit: float) -> Capture:
    relaxed = None
    with one_at_a_time, watched(_name(attempt.module), limit if open_sizes else None):
        if open_sizes:
            program, relaxed = _export_open(attempt)
        else:
            program = attempt.export(None)
    given = attempt.given()
    dtype = attempt.probe or _own_dtype(attempt.module, given)
    fixed = relaxed is None or relaxed.hashable or relaxed.frozen[0] > 0
    return Capture(program, _sources(program, given), dtype, attempt.probe, given, open_sizes, fixed)


def _export_open(attempt: _Attempt) -> tuple[ExportedProgram, Relaxed]:
    """Export with open sizes, with as much done for code that wants plain numbers as it needs."""
    relaxed = Relaxed()
    try:
        program = attempt.export(relaxed)
    except Exception as error:
        if _UNHASHABLE not in str(error):
            raise
        relaxed = Relaxed(hashable=True)
        program = attempt.export(relaxed)
    if not relaxed.frozen[0]:
        return program, relaxed
    again = replace(relaxed, open_numbers=True, frozen=[0])
    try:
        return attempt.export(again), again
    except Exception:  # code that cannot have them open
        return program, relaxed


def probe_dtypes(module: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.dtype | None, ...]:
    """List the dtypes to capture a module in, best first: the probe, its own, float32.

    Its own come first if it does not run in the probe's, or calls other functions then.
    """
    found = {tensor.dtype for tensor in (*_tensors_of(module), *_tensors_in(dict(inputs))) if tensor.is_floating_point()}
    if found <= {PROBE_DTYPE}:
        return (PROBE_DTYPE, torch.float32)
    own: tuple[torch.dtype | None, ...] = (None,) if found == {torch.float32} else (None, torch.float32)
    as_probe, as_own = (functions_called(meta_copy(module, each), meta_inputs(dict(inputs), each)) for each in (PROBE_DTYPE, None))
    if as_own is None or as_own == as_probe:
        return (PROBE_DTYPE, *own)
    return (*own, PROBE_DTYPE) if as_probe is None else own


@dataclass(frozen=True)
class CallArguments:
    """What submodules receive: meta arguments by parameter name, by path; or why one cannot be captured.

    Attributes:
        probe: the dtype that the model ran in, None for its own.
    """

    by_path: Mapping[str, dict[str, Any] | Refusal]
    probe: torch.dtype | None

    def capture(self, module: nn.Module, path: str) -> Capture:
        """Capture the submodule at a path, as its arguments were recorded.

        Where the model does not run in the probe's dtype, the submodule may.

        Raises:
            CaptureError: it cannot be captured.
        """
        arguments = self.by_path[path]
        assert not isinstance(arguments, Refusal)
        if self.probe is PROBE_DTYPE:
            return capture(module, arguments, functional=True, cast=False, probes=(PROBE_DTYPE,))
        found = probe_dtypes(module, arguments)
        probes = (PROBE_DTYPE, self.probe) if found[0] is PROBE_DTYPE else (self.probe, PROBE_DTYPE)[: 1 + (PROBE_DTYPE in found)]
        return _first_that_works([_Attempt(module, arguments, True, _in_dtype, probe) for probe in probes], True)


def _in_dtype(arguments: Any, dtype: torch.dtype | None) -> Any:
    """Bring recorded arguments to a dtype. They stay on their devices: a table on the CPU is one that the model moves."""

    def leaf(value: Any) -> Any:
        cast = isinstance(value, Tensor) and value.is_floating_point() and dtype is not None
        return torch.empty(value.shape, dtype=dtype, device=value.device) if cast else value

    return pytree.tree_map(leaf, arguments)


def call_arguments(
    module: nn.Module, inputs: Mapping[str, Any], paths: set[str], probes: tuple[torch.dtype | None, ...] | None = None
) -> CallArguments:
    """Record what each submodule at `paths` receives when `module(**inputs)` runs.

    A variable keyword parameter's content is merged in. A submodule called several times reports its first call; one whose
    arguments have no names, why it cannot be captured.

    Raises:
        CaptureError: the module does not run on meta tensors.
    """
    errors: dict[torch.dtype | None, Exception] = {}
    tried = probes or probe_dtypes(module, inputs)
    for run, one_device in ((_run, False), (_run, True), (_run_in_export, False), (_run_in_export, True)):
        for probe in tried:
            if one_device and not _two_devices(errors[probe]):
                continue
            structure = meta_copy(module, probe)
            received: dict[str, dict[str, Any] | Refusal] = {}
            for path in paths:
                structure.get_submodule(path).register_forward_pre_hook(_recorder(received, path), with_kwargs=True)
            try:
                with capturing(structure, one_device=one_device), torch.no_grad():
                    run(structure, meta_inputs(dict(inputs), probe))
                return CallArguments(received, probe)
            except Exception as error:
                errors.setdefault(probe, error)
    raise _capture_error(module, errors)


def _run(structure: nn.Module, inputs: dict[str, Any]) -> None:
    structure(**inputs)


def _run_in_export(structure: nn.Module, inputs: dict[str, Any]) -> None:
    """Run a module that needs values, such as an index of booleans, which meta tensors do not have."""
    _export(structure, inputs, functional=False, symbolic=False)


def _recorder(received: dict[str, dict[str, Any] | Refusal], path: str) -> Callable[..., None]:
    """Make a forward hook that keeps the arguments of the first call."""

    def hook(submodule: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            received.setdefault(path, pytree.tree_map(_plain, bound_arguments(submodule, args, kwargs, variable=True)))
        except CaptureError as error:
            received.setdefault(path, Refusal(reason=f"{path}: {error}"))

    return hook


def _plain(leaf: Any) -> Any:
    """Make a tensor of an export, or a size, one of its own.

    Raises:
        CaptureError: only the data tells its size.
    """
    if isinstance(leaf, torch.SymInt):
        return _plain_size(leaf)
    if not isinstance(leaf, Tensor) or type(leaf) in (Tensor, nn.Parameter):
        return leaf
    sizes = [_plain_size(size) for size in leaf.shape]
    return torch.empty(sizes, dtype=leaf.dtype, device=leaf.device)


def _plain_size(size: int | torch.SymInt) -> int:
    known = known_size(size)
    if known is None:
        raise CaptureError("it is given tensors of a size that only the data tells, as an index of booleans makes them")
    return known


def call_form(module: nn.Module, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a call: all by keyword, unless a variable positional parameter gets something."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    variable = next((at for at, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL and inputs.get(p.name)), None)
    if variable is None:
        return (), inputs
    before = [p.name for p in parameters[:variable]]
    rest = {name: value for name, value in inputs.items() if name not in (*before, parameters[variable].name)}
    return (*(inputs[name] for name in before), *inputs[parameters[variable].name]), rest


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, variable: bool = False) -> dict[str, Any]:
    """Return a call's arguments by parameter name, without those left at their defaults.

    Args:
        variable: whether what a variable positional parameter gets may be among them, as a tuple.

    Raises:
        CaptureError: one of them has no name.
    """
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL and not variable:
            raise CaptureError(f"{type(module).__name__}.forward takes *{name}; give its arguments names")
        else:
            named[name] = value
    return named


def _export(structure: nn.Module, inputs: dict[str, Any], functional: bool, symbolic: bool) -> ExportedProgram:
    with torch.no_grad(), _quiet():
        program = _exported(structure, inputs, symbolic)
        if functional and any(writes_into_operand(node.target) for node in program.graph.nodes):
            drop_size_checks(program)
            program = program.run_decompositions({})
        return program


def _exported(structure: nn.Module, inputs: dict[str, Any], symbolic: bool) -> ExportedProgram:
    """Export with numbers among the inputs open like sizes, for they may be sizes; fixed, where a module cannot have them open."""

    args, kwargs = call_form(structure, inputs)

    def export(open_dims: Any) -> ExportedProgram:
        dynamic = pytree.tree_map(open_dims, inputs) if symbolic else None
        return torch.export.export(structure, args, kwargs, dynamic_shapes=dynamic, strict=False)

    if not symbolic or not any(type(leaf) is int for leaf in pytree.tree_leaves(inputs)):
        return export(_open_sizes)
    try:
        return export(_open_sizes_and_numbers)
    except Exception:
        return export(_open_sizes)


def _open_sizes(leaf: Any) -> Any:
    return dict.fromkeys(range(leaf.ndim), Dim.AUTO) if isinstance(leaf, Tensor) else None


def _open_sizes_and_numbers(leaf: Any) -> Any:
    return Dim.AUTO if type(leaf) is int else _open_sizes(leaf)


def _unmarked(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor.detach()


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


def _tensors_in(nested: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor))


def _own_dtype(module: nn.Module, inputs: Any) -> torch.dtype:
    """Return the floating-point dtype that most of a module's numbers have; of its inputs, if it has none."""
    counts: dict[torch.dtype, int] = {}
    for tensor in (*_tensors_of(module), *_tensors_in(inputs)):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.get_default_dtype())


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _meta(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=kept, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _sources(program: ExportedProgram, inputs: Mapping[str, Any]) -> dict[str, Source]:
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.USER_INPUT: "input"}
    readings = iter(name + pytree.keystr(keys) for name, value in inputs.items() for keys, _ in pytree.tree_flatten_with_path(value)[0])
    sources = {}
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        target = next(readings, name) if spec.kind is InputKind.USER_INPUT else spec.target or name
        sources[name] = Source(kinds.get(spec.kind, "constant"), target)
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


def _capture_error(module: nn.Module, errors: Mapping[torch.dtype | None, Exception]) -> CaptureError:
    """Say why a module cannot be captured, in its own dtypes if that was tried."""
    told = errors.get(None, next(iter(errors.values())))
    found = CaptureError(_explanation(module, told))
    found.__cause__ = told
    return found


def _explanation(module: nn.Module, error: Exception) -> str:
    frame = _innermost_user_frame(error)
    where = f" at {frame}" if frame else ""
    return (
        f"{type(module).__name__} cannot be captured{where}: {type(error).__name__}: {first_line(error)} "
        "If a value decides the control flow there, make it an attribute fixed at construction; if the inputs are wrong, "
        "pass example_inputs=dict(...) or record them with edit_compile.record(pipe, ...)."
    )


def what_failed(error: Exception) -> str:
    """Describe an exception of somebody else's code in one line: its type, the first line of what it says, and where it was raised."""
    frame = _innermost_user_frame(error)
    return f"{type(error).__name__}: {first_line(error)}" + (f" at {frame}" if frame else "")


def _innermost_user_frame(error: Exception) -> str | None:
    others = (TORCH_FOLDER, _OWN_FOLDER, THIS_FILE)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f"{path_in_package(frames[-1].filename)}:{frames[-1].lineno} ({frames[-1].line})" if frames else None
