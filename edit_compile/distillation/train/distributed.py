"""Wraps the models for training: precision, recomputation, compilation, and several processes.

`accelerate launch` decides on the processes: with FSDP (version 2) the student's parameters are sharded per repeated block, from
the beginning; otherwise gradients are averaged (DDP). The layerwise fit, without a backward pass through the model, averages
its gradients by itself.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from edit_compile.api import REGIONAL, repeated_blocks
from edit_compile.api import compile as compile_blocks
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.trackers import chosen_trackers
from edit_compile.errors import DistillError
from edit_compile.student.site import converted_sites
from edit_compile.torch_internals import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator

_PATIENCE = timedelta(hours=2)  # of processes for the first one, which writes checkpoints and encodes alone


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Make the accelerator, in whatever processes `accelerate launch` has started.

    Raises:
        DistillError: it was launched with another precision than the recipe's, or in a way that is not supported.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import ProjectConfiguration

    # A block that drops its text rows leaves the parameters of their projections without gradient.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    group = InitProcessGroupKwargs(timeout=_PATIENCE)
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
    """Give every process the first one's sites: conversion initialises at random what it adds."""
    from accelerate.utils import broadcast

    for site in converted_sites(student).values():
        for tensor in itertools.chain(site.parameters(), site.buffers()):
            tensor.copy_(broadcast(tensor.to(accelerator.device)))


def set_precision(student: nn.Module, trained: Iterable[str], precision: str) -> None:
    """Convert, under "bf16", weights and buffers to bfloat16, except those that are trained, which are kept in float32."""
    if precision != "bf16":
        return
    names = set(trained)
    for site in converted_sites(student).values():
        site.edit_teacher.to(torch.bfloat16)
    for name, tensor in itertools.chain(student.named_parameters(), student.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if name in names else torch.bfloat16)


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


def shard(student: nn.Module, accelerator: Accelerator) -> None:
    """Shard with FSDP2, in place: a group for each repeated block, and one for the rest; each group is moved to the device in turn.

    Which parameters require gradients must be settled before. Teachers are not sharded and stay where they are.
    """
    from torch.distributed.fsdp import fully_shard

    plugin = accelerator.state.fsdp_plugin
    given = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for path in repeated_blocks(student):
        fully_shard(student.get_submodule(path), **options)
    fully_shard(student, **options)


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
        forward = torch.compile(block.forward, **REGIONAL) if compiled else block.forward
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, forward, use_reentrant=False)


def gathered(items: list[Any]) -> list[Any]:
    """Gather the items of all processes. All must call it."""
    from accelerate.utils import gather_object

    found: list[Any] = gather_object(items)
    return found


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


def distribute_like(value: Tensor, other: Tensor) -> Tensor:
    """Put a full tensor on another's device, in shards like its."""
    value = value.to(other.device)
    if not is_sharded(other) or value.shape != other.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, other.device_mesh, other.placements)  # type: ignore[attr-defined]
