"""Wraps the models for training: precision, recomputation, compilation, and several processes.

`accelerate launch` decides on the processes: with FSDP (version 2) the student's parameters are sharded per repeated block, from
the beginning; otherwise gradients are averaged (DDP). The layerwise fit, without a backward pass through the model, averages
its gradients by itself.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from edit_compile.adapters.stored_dtype import loading_dtype
from edit_compile.api import block_options, repeated_blocks
from edit_compile.api import compile as compile_blocks
from edit_compile.distillation.processes import PATIENCE, gathered
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.trackers import chosen_trackers
from edit_compile.errors import DistillError, some_of
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import forget_originals
from edit_compile.tensor_files import SavedTensors
from edit_compile.torch_internals import is_sharded, place_of_shard

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Make the accelerator, in whatever processes `accelerate launch` has started.

    Raises:
        DistillError: it was launched with another precision than the recipe's, or in a way that is not supported.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import ProjectConfiguration

    # A block that drops its text rows leaves the parameters of their projections without gradient.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    group = InitProcessGroupKwargs(timeout=PATIENCE)
    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
    accelerator = Accelerator(kwargs_handlers=[ddp, group], log_with=chosen_trackers(recipe.trackers) or None, project_config=places)
    # `accelerate launch --use_fsdp` sets it, and transformers then loads encoders in the first process alone.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    if accelerator.mixed_precision not in ("no", recipe.precision):
        raise DistillError(
            f"launched with {accelerator.mixed_precision} mixed precision, but the recipe says precision: {recipe.precision}; "
            "launch with --mixed_precision no, and let the recipe decide"
        )
    if accelerator.num_processes > 1:
        _check_kind(accelerator, recipe)
    return accelerator


def _check_kind(accelerator: Accelerator, recipe: Recipe) -> None:
    kind = accelerator.distributed_type.value
    if not kind.startswith(("FSDP", "MULTI_")):
        raise DistillError(f"{kind} is not supported: launch with DDP or with FSDP version 2")
    if kind != "FSDP":
        return
    if not accelerator.is_fsdp2:
        raise DistillError("FSDP version 1 is not supported: launch with --fsdp_version 2")
    if recipe.optimizer.kind != "adamw":
        raise DistillError(f"optimizer.kind: {recipe.optimizer.kind} does not support FSDP: choose adamw, or launch with DDP")
    if recipe.lora is not None and recipe.lora.merge:
        raise DistillError(
            "lora.merge: true does not support FSDP: leave it out, and merge the finished student: edit_compile.merge_lora(load(folder))"
        )


@torch.no_grad()
def share_sites(student: nn.Module, accelerator: Accelerator) -> None:
    """Give every process what the first one's sites have besides the original's weights: conversion initialises it at random.

    Raises:
        DistillError: the processes have converted the model in different ways, as they may if some of them had too little time for it.
    """
    from accelerate.utils import broadcast

    shapes = repr([(name, tuple(tensor.shape)) for name, tensor in student.state_dict().items()])
    found = gathered([hashlib.sha256(shapes.encode()).hexdigest()])
    if different := [rank for rank, each in enumerate(found) if each != found[0]]:
        raise DistillError(
            f"{some_of(f'process {rank}' for rank in different)} converted the model in another way than process 0: convert it once, by "
            "edit-compile convert, and give that as the recipe's model"
        )
    for site in converted_sites(student).values():
        added = site.get_submodule(ADDED)
        for tensor in itertools.chain(added.parameters(), added.buffers()):
            tensor.copy_(broadcast(tensor.to(accelerator.device)))


def set_precision(model: nn.Module, trained: Iterable[str], precision: str, path: str = "", loaded_in: torch.dtype | None = None) -> None:
    """Convert, under "bf16", weights and buffers to bfloat16, except those that are trained, which are kept in float32.

    Args:
        trained: names of parameters.
        path: of the part of the model that is converted, except what is sharded; default: the whole.
        loaded_in: what they are rounded to first, under other precisions too: the dtype that they would have been loaded in.
    """
    if precision != "bf16" and loaded_in is None:
        return
    part, names, frozen_in = model.get_submodule(path), set(trained), torch.bfloat16 if precision == "bf16" else torch.float32
    teachers = [(f"{path}.{inside}".strip("."), site.edit_teacher) for inside, site in converted_sites(part).items()]
    for prefix, module in ((path, part), *teachers):
        for name, tensor in itertools.chain(module.named_parameters(prefix), module.named_buffers(prefix)):
            if tensor.is_floating_point() and not is_sharded(tensor) and (precision == "bf16" or tensor.dtype != torch.float64):
                values = tensor.data if loaded_in is None else tensor.data.to(loading_dtype(model, name, loaded_in))
                tensor.data = values.to(torch.float32 if module is part and name in names else frozen_in)


def wrap(student: nn.Module, teacher: nn.Module, recipe: Recipe, accelerator: Accelerator) -> nn.Module:
    """Return the student as the stages call it; its own forward, and the teacher's, are prepared in place."""
    if recipe.gradient_checkpointing:
        recompute_blocks(student, compiled=recipe.compile)
    elif recipe.compile:
        compile_blocks(student)
    if recipe.compile and teacher is not student:
        compile_blocks(teacher)
    return accelerator.prepare(student) if accelerator.num_processes > 1 and not shards(accelerator) else student


def shards(accelerator: Accelerator) -> bool:
    """Tell whether the student is sharded."""
    return bool(accelerator.num_processes > 1 and accelerator.distributed_type.value == "FSDP")


def shard(model: nn.Module, trained: Iterable[str], recipe: Recipe, accelerator: Accelerator, loaded_in: torch.dtype | None = None) -> None:
    """Shard with FSDP2, in place: a group for each repeated block, for each site's teacher, and one for the rest.

    Each group in turn is converted to the recipe's precision and moved to the device, where only this process's shards of it stay. Weights
    that are mapped from files are read here, and no process ever has all of them in its memory.

    Which parameters require gradients must be settled before. Where blocks are compiled teachers are not sharded: FSDP gathers weights
    outside compiled code, and their calls are inside.

    Args:
        trained: names of parameters, which stay in float32.
        loaded_in: as of `set_precision`.
    """
    from torch.distributed.fsdp import fully_shard

    plugin = accelerator.state.fsdp_plugin
    given = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for path in (*repeated_blocks(model), ""):
        set_precision(model, trained, recipe.precision, path, loaded_in)
        part = model.get_submodule(path)
        for teacher in (site.edit_teacher for site in converted_sites(part).values()):
            sharded = [is_sharded(parameter) for parameter in teacher.parameters()]
            if recipe.compile or not sharded:
                teacher.to(accelerator.device)
            elif not any(sharded):
                fully_shard(teacher, **options | {"reshard_after_forward": True})
        fully_shard(part, **options)
    forget_originals(model)


def reshard(student: nn.Module) -> None:
    """Free the unsharded parameters that a forward without a backward pass leaves behind: they would outlive the next step."""
    for module in student.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def recompute_blocks(student: nn.Module, *, compiled: bool = False) -> None:
    """Turn on gradient checkpointing of the repeated blocks, in place, for any model.

    A block that runs again in a backward pass finds the grid, and teacher or student, of its own forward: see `student.runtime`.

    Args:
        compiled: compile them as well, inside: what `nn.Module.compile` compiles is the call of a block, and dynamo stops at
            the checkpointing in it.
    """
    for path in repeated_blocks(student):
        block = student.get_submodule(path)
        forward = torch.compile(block.forward, **block_options()) if compiled else block.forward
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, forward, use_reentrant=False)


def gather_full(tensor: Tensor) -> Tensor:
    """Gather a tensor from its shards. All processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def to_local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, without gradient; it shares the storage."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def mean_in_shards(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Average a full gradient over processes, into shards like its parameter's; for an unsharded parameter, return it as it is."""
    if not is_sharded(parameter):
        return gradient
    from torch.distributed.tensor import DTensor, Partial

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    summed = DTensor.from_local(gradient / mesh.size(), mesh, [Partial("sum")] * mesh.ndim, run_check=False)
    return summed.redistribute(placements=parameter.placements).to(parameter.device)  # type: ignore[attr-defined]


def read_like(saved: SavedTensors, name: str, other: Tensor) -> Tensor:
    """Read a tensor to another's device; if it is of the shape of one that is sharded, this process's shard alone, as a shard like it."""
    if not is_sharded(other) or saved.shape(name) != tuple(other.shape):
        return saved.read(name).to(other.device)
    from torch.distributed.tensor import DTensor

    local = saved.read(name, *place_of_shard(other)[:2]).to(other.device)
    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=other.shape, stride=other.stride())
