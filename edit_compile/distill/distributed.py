"""Wrapping the student for its stages: precision, recomputation, compilation, and several processes.

`accelerate launch` decides on the processes: with FSDP (version 2) parameters are sharded per repeated block, otherwise
gradients are averaged (DDP). The warm start needs none of it: its gradients are averaged by hand.
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
from edit_compile.sites import converted_sites

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
    if kind != "FSDP":
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


def wrap(student: nn.Module, recipe: Recipe, accelerator: Accelerator) -> nn.Module:
    """The student as the stages call it; its own forward is prepared in place."""
    if recipe.gradient_checkpointing:
        recompute_blocks(student)
    if recipe.compile:
        compile_blocks(student)
    if accelerator.num_processes == 1:
        return student
    if accelerator.distributed_type.value == "FSDP":
        plugin = accelerator.state.fsdp_plugin
        return shard(student, reshard_after_forward=plugin.reshard_after_forward, offload_policy=plugin.cpu_offload)
    return accelerator.prepare(student)


def shard(student: nn.Module, **options: Any) -> nn.Module:
    """FSDP2 in place: a group of shards for each repeated block, and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    options = {name: value for name, value in options.items() if value is not None}
    for path in repeated_blocks(student):
        fully_shard(student.get_submodule(path), **options)
    fully_shard(student, **options)
    return student


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
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """This process' shard of a tensor, without gradient; the same storage."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, on another's device and in its shards."""
    value = value.to(other.device)
    if not hasattr(other, "device_mesh") or value.shape != other.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, other.device_mesh, other.placements)  # type: ignore[attr-defined]
