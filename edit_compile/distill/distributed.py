"""Wrapping the models for training: precision, recomputation, compilation, and several processes.

`accelerate launch` decides on the processes: with FSDP (version 2) the student's parameters are sharded per repeated block, from
the beginning; otherwise gradients are averaged (DDP). The warm start, without a backward pass through the model, averages its
gradients by itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from edit_compile.api import compile as compile_blocks
from edit_compile.api import repeated_blocks
from edit_compile.distill.recipe import Recipe
from edit_compile.distill.trackers import chosen_trackers
from edit_compile.errors import DistillError
from edit_compile.sites import converted_sites, is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """The accelerator, in whatever processes `accelerate launch` has made.

    Raises:
        DistillError: it was launched with another precision than the recipe's, or as what is not supported.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import ProjectConfiguration

    # A block that drops its text rows leaves the parameters of their projections without gradient.
    options = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
    accelerator = Accelerator(kwargs_handlers=[options], log_with=chosen_trackers(recipe.trackers) or None, project_config=places)
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
    if not _is_fsdp(accelerator):
        return
    if not accelerator.is_fsdp2:
        raise DistillError("FSDP version 1 is not supported: launch with --fsdp_version 2")
    if recipe.optimizer.kind == "adamw-8bit":
        raise DistillError("optimizer.kind: adamw-8bit does not know FSDP's shards: choose adamw, or launch with DDP")


def set_precision(student: nn.Module, trained: Iterable[str], precision: str) -> None:
    """Under "bf16", weights and buffers to bfloat16, except those that are trained: these to float32."""
    if precision != "bf16":
        return
    names = set(trained)
    for site in converted_sites(student).values():
        site.edit_teacher.to(torch.bfloat16)
    for name, tensor in itertools.chain(student.named_parameters(), student.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if name in names else torch.bfloat16)


def wrap(student: nn.Module, teacher: nn.Module, recipe: Recipe, accelerator: Accelerator) -> nn.Module:
    """The student as the stages call it; its own forward, and the teacher's, are prepared in place."""
    if recipe.gradient_checkpointing:
        recompute_blocks(student)
    if recipe.compile:
        for model in dict.fromkeys((student, teacher)):
            compile_blocks(model)
    return student if accelerator.num_processes == 1 or _is_fsdp(accelerator) else accelerator.prepare(student)


def shard(student: nn.Module, accelerator: Accelerator) -> None:
    """FSDP2 in place, where launched with it: a group of shards for each repeated block, and one for the rest.

    Which parameters require gradients must be settled.
    """
    if accelerator.num_processes == 1 or not _is_fsdp(accelerator):
        return
    from torch.distributed.fsdp import fully_shard

    plugin = accelerator.state.fsdp_plugin
    given = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for path in repeated_blocks(student):
        fully_shard(student.get_submodule(path), **options)
    fully_shard(student, **options)


def reshard(student: nn.Module) -> None:
    """Let go of the whole parameters that a forward without a backward pass leaves behind: they would outlive the next step."""
    for module in student.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def _is_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type.value == "FSDP"


def recompute_blocks(student: nn.Module) -> None:
    """Gradient checkpointing of the repeated blocks, in place, for any model."""
    for path in repeated_blocks(student):
        block = student.get_submodule(path)
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes. All must ask."""
    from accelerate.utils import gather_object

    return gather_object(items)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from its shards. All processes must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process' shard of a tensor, without gradient; the same storage."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def mean_in_shards(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The mean over processes of a whole gradient, as shards like its parameter's; if that is whole, the gradient as it is."""
    if not is_sharded(parameter):
        return gradient
    from torch.distributed.tensor import DTensor, Partial

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    summed = DTensor.from_local(gradient / mesh.size(), mesh, [Partial("sum")] * mesh.ndim, run_check=False)
    return summed.redistribute(placements=parameter.placements).to(parameter.device)  # type: ignore[attr-defined]


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, on another's device and in its shards."""
    value = value.to(other.device)
    if not is_sharded(other) or value.shape != other.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, other.device_mesh, other.placements)  # type: ignore[attr-defined]
