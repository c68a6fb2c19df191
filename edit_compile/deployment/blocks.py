"""A converted model's repeated blocks as compiled code without weights, which any student of the same structure can run.

Of equal blocks one is compiled, as by regional `torch.compile`, but once and for all: what loads the file compiles nothing. Each block
keeps its own weights, which its code is pointed to.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from pydantic import ValidationError
from torch import Tensor, nn

from edit_compile.adapters.step_cache import step_cache_of
from edit_compile.api import repeated_blocks
from edit_compile.bench.flops import block_keys
from edit_compile.deployment.cases import Case, Varying, device_of, difference, fits, input_names, plain, split_constants, tensors_of
from edit_compile.deployment.formats import KEY, parsed, quiet
from edit_compile.deployment.program import Program, call_case, make_program
from edit_compile.deployment.size_conditions import Equation, SizeConditions
from edit_compile.errors import ExportError, first_line
from edit_compile.frozen import Frozen, first_problem
from edit_compile.passes.capture import bound_arguments
from edit_compile.progress import each, working
from edit_compile.student.handle import ConvertedModel, unwrap
from edit_compile.student.runtime import Frame, Runtime
from edit_compile.torch_internals import eager_instead_of_compiled, is_quantized, is_sharded, memory_id

log = logging.getLogger(__name__)

_GRIDS = "image_grids"  # the further input of a block: tensors that stand for the call's grids
_BLOCK = "block."  # what names of weights begin with


class BlockDescription(Frozen):
    """Compiled code, and the calls that it is for."""

    names: tuple[str, ...]
    """Of its tensors, in order."""
    shapes: tuple[tuple[int | str, ...], ...]
    """Of each; words where sizes may vary."""
    dtypes: tuple[str, ...]
    constants: dict[str, Any]
    """Arguments that are fixed in it."""
    conditions: tuple[Equation, ...]
    """Equations of sizes that it takes for granted."""
    weights: dict[str, str]
    """Types and shapes of the block's own weights that it reads, by name."""


class BlocksDescription(Frozen):
    """What a file of blocks knows of itself."""

    version: int = 1
    edit_compile: str
    torch: str
    model: str
    device: str
    blocks: dict[str, str]
    """The name of the code of each block, by the block's path."""
    code: dict[str, BlockDescription]
    sizes: tuple[str, ...]


class _DeployedBlock(nn.Module):
    """A block as a function of tensors: its grids come as their shapes, other arguments are fixed."""

    def __init__(self, block: nn.Module, runtime: Runtime, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.block, self.runtime, self.constants = block, runtime, dict(constants)

    def forward(self, **inputs: Any) -> Any:
        before = self.runtime.frame()
        self.runtime.local.frame = Frame(False, inputs.pop(_GRIDS), None)
        try:
            return self.block(**self.constants, **inputs)
        finally:
            self.runtime.local.frame = before


def _calls(model: ConvertedModel, cases: Sequence[Case]) -> list[dict[str, dict[str, Any]]]:
    """Record what each block receives in each case, its grids among it."""
    found = []
    for case in cases:
        calls: dict[str, dict[str, Any]] = {}
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(functools.partial(_keep, calls, model, path), with_kwargs=True)
            for path in repeated_blocks(model)
        ]
        try:
            with eager_instead_of_compiled():
                call_case(model, case)
        finally:
            for hook in hooks:
                hook.remove()
        found.append(calls)
    return found


def _keep(calls: dict[str, Any], model: ConvertedModel, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    frame = model.edit_conversion.runtime.frame()
    assert frame is not None
    calls.setdefault(path, _packed({**bound_arguments(block, args, kwargs), _GRIDS: frame.grids}))


def _packed(call: dict[str, Any]) -> dict[str, Any]:
    """Have all tensors in a call contiguous, for compiled code takes their strides for granted; not grids, whose content nobody reads."""
    packed = pytree.tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, call)
    return {**packed, _GRIDS: call[_GRIDS]}


@dataclass(frozen=True)
class _Code:
    """A captured block that equal ones share."""

    program: Program
    about: BlockDescription


def capture_blocks(model: ConvertedModel, cases: Sequence[Case]) -> tuple[dict[str, str], dict[str, _Code]]:
    """Capture the distinct blocks of a model.

    Returns:
        The name of the code of each block, by path; and each code.

    Raises:
        ExportError: a block cannot be captured.
    """
    with working("recording what blocks receive"):
        first, *others = _calls(model, cases)
    keys = block_keys(model, first)
    names: dict[Any, str] = {}
    blocks: dict[str, str] = {}
    code: dict[str, _Code] = {}
    for path in each(first, "capturing blocks", len(first)):
        call, constants = split_constants(first[path])
        key = (keys[path], str(pytree.tree_structure(call)), str(constants), str([(t.shape, t.dtype) for t in tensors_of(call)]))
        if key not in names:
            names[key] = name = f"code{len(names)}"
            varying: Varying = {}
            for other in others:
                varying |= difference(first[path], other[path], "size")
            code[name] = _captured(model, path, call, constants, varying)
        blocks[path] = names[key]
    return blocks, code


def _captured(model: ConvertedModel, path: str, call: dict[str, Any], constants: dict[str, Any], varying: Varying) -> _Code:
    runtime, block = model.edit_conversion.runtime, model.get_submodule(path)
    what = f"{path} of {type(model).__name__}"
    program = make_program(_DeployedBlock(block, runtime, constants), call, constants, varying, what=what, for_torch=True)
    read = sorted(program.exported.state_dict)
    if lifted := [name for name in program.exported.constants if name not in program.exported.state_dict]:
        owned = {f"{_BLOCK}{name}" for name, _ in block.named_buffers()}
        if others := [name for name in lifted if name not in owned]:
            raise ExportError(
                f"{what} makes constants of its own ({others[0]}), which code without weights cannot hold: export the whole model"
            )
        read += lifted
    own = _weights_of(block)
    weights = {name: _kind(own[name]) for name in (each.removeprefix(_BLOCK) for each in read)}
    dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors_of(call))
    fixed: dict[str, Any] = {"constants": plain(constants), "conditions": program.conditions, "weights": weights}
    return _Code(program, BlockDescription(names=program.names, shapes=program.shapes, dtypes=dtypes, **fixed))


def write_blocks(code: Mapping[str, _Code], path: Path, described: str) -> None:
    """Compile captured blocks, and package them as one file without weights."""
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    options = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
    files: dict[str, Any] = {}
    for name, one in each(code.items(), "compiling blocks", len(code)):
        exported = one.program.exported
        graph, (args, kwargs) = exported.module(check_guards=False), exported.example_inputs
        files[name] = aot_compile(graph, args, kwargs, options={**options, "aot_inductor.metadata": {KEY: described}})
    package_aoti(str(path), files)


def _weights_of(block: nn.Module) -> dict[str, Tensor]:
    """List a block's parameters and buffers by name."""
    named = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def _kind(tensor: Tensor) -> str:
    """Write what compiled code takes for granted of a weight: its type and shape; of one that is no plain tensor, its class."""
    is_plain = not is_quantized(tensor) and not is_sharded(tensor)
    return f"{str(tensor.dtype).removeprefix('torch.') if is_plain else type(tensor).__name__} {tuple(tensor.shape)}"


def _unfit(about: BlockDescription, state: Mapping[str, Tensor]) -> str | None:
    """Say which weight is not what compiled code takes for granted; None if all are. LoRA and quantization make others of them."""
    for name, kind in about.weights.items():
        found = _kind(state[name]) if name in state else "missing"
        if found != kind:
            return f"{name} is {found}, not {kind}"
    return None


class _CompiledForward:
    """The forward of a block that has compiled code: runs it where it holds for the call, and the block's own forward elsewhere."""

    def __init__(self, model: ConvertedModel, block: nn.Module, device: str, about: BlockDescription, package: Any) -> None:
        self.runtime, self.block, self.device, self.about, self.package = model.edit_conversion.runtime, block, device, about, package
        self.original: Callable[..., Any] = block.forward
        self.conditions = SizeConditions(about.conditions)
        self.outputs: Any = pytree.treespec_loads(package.loader.get_call_spec()[1])
        self.seen: tuple[Any, ...] = ()  # the memory of the block's weights when the code was last pointed to them
        self.fits = False  # and whether it could be
        self.runs = 0  # of the code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the block's own forward: the code is pointed to one block's weights, and cannot be to another's at once."""
        return copy.deepcopy(self.original, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = self.runtime.frame()
        if frame is None or frame.teacher or frame.outputs is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        call, constants = split_constants(_packed({**bound_arguments(self.block, args, kwargs), _GRIDS: frame.grids}))
        tensors = tensors_of(call)
        known = tuple(input_names(call)) == self.about.names and plain(constants) == self.about.constants
        if not known or not self._takes(tensors) or not self._point():
            log.info("%s runs uncompiled: its code is for other weights, or calls of other sizes or arguments", type(self.block).__name__)
            return self.original(*args, **kwargs)
        self.runs += 1
        return pytree.tree_unflatten(self.package.loader.boxed_run(tensors), self.outputs)

    def _takes(self, tensors: list[Tensor]) -> bool:
        """Say whether the code holds for a call with these tensors."""
        here, about = all(tensor.device.type == self.device for tensor in tensors), self.about
        return here and fits(tensors, about.shapes, about.dtypes) and self.conditions.broken(tensors, about.names) is None

    def _point(self) -> bool:
        """Point the code to the block's weights as they are now; say whether it can be, as not with LoRA or quantized ones."""
        state = _weights_of(self.block)
        memory = tuple((name, memory_id(tensor), tensor.device.type) for name, tensor in state.items())
        if memory != self.seen:
            self.seen, self.kept = memory, state
            self.fits = all(tensor.device.type == self.device for tensor in state.values()) and _unfit(self.about, state) is None
            if self.fits:
                weights = {f"{_BLOCK}{name}": state[name] for name in self.about.weights}
                self.package.load_constants(weights, check_full_update=True, user_managed=True)
        return self.fits


def load_blocks(student: Any, path: str | Path) -> Any:
    """Give a converted model's repeated blocks the compiled code of a file that `export(..., blocks=True)` wrote, in place.

    Nothing is compiled. The code runs without gradients, at all sizes that it was made for; as the teacher, and in other calls, blocks run
    as before.

    Args:
        student: a converted model, or what holds one: a pipeline. On the device that the code is for.
        path: of the file. It holds compiled code, which runs when it is loaded: load only your own.

    Returns:
        What was given.

    Raises:
        ExportError: it is no such file, or its blocks are not the student's.
    """
    from torch._inductor.package.package import load_package

    path, model = Path(path), unwrap(student)
    if not path.is_file():
        raise ExportError(f"{path}: there is no such file")
    about = _described(path)
    if (cache := step_cache_of(model)) is not None:
        raise ExportError(
            f"{type(model).__name__} has a cache of sampling steps ({cache}): load its blocks' code first, and enable the cache then"
        )
    if about.device != device_of(model).type:
        raise ExportError(f"{path} holds code for {about.device}; the student is on {device_of(model).type}")
    blocks = repeated_blocks(model)
    if missing := sorted(set(blocks) ^ about.blocks.keys()):
        raise ExportError(f"{path} was made of another {about.model}: it has other blocks, such as {missing[0]}")
    for block_path in each(blocks, "loading blocks", len(blocks)):
        block, name = model.get_submodule(block_path), about.blocks[block_path]
        if (problem := _unfit(about.code[name], _weights_of(block))) is not None:
            raise ExportError(f"{path} was made of another {about.model}, or one with other weights: in {block_path}, {problem}")
        with quiet():
            package = load_package(str(path), name)
        block.__dict__["forward"] = _CompiledForward(model, block, about.device, about.code[name], package)
    return student


def runs_of_blocks(model: nn.Module, blocks: Iterable[str]) -> dict[str, int]:
    """Count how often the compiled code of each block has run."""
    forwards: dict[str, Any] = {path: model.get_submodule(path).forward for path in blocks}
    return {path: forward.runs if isinstance(forward, _CompiledForward) else 0 for path, forward in forwards.items()}


def _described(path: Path) -> BlocksDescription:
    from torch._inductor.package.package import load_package

    try:
        with quiet():
            described = load_package(str(path), "code0").get_metadata().get(KEY)
    except Exception as error:
        raise ExportError(f"{path} cannot be loaded as compiled blocks: {type(error).__name__}: {first_line(error)}") from error
    try:
        return BlocksDescription.model_validate(parsed(described, path))
    except ValidationError as error:
        raise ExportError(f"{path} was written by another version of edit_compile: {first_problem(error)}") from None
