"""What every part of a run needs: the models, the data, the noise, the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.adapters.denoise import denoise, misfit
from edit_compile.adapters.inputs import tokens_of_size
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.api import repeated_blocks, teacher
from edit_compile.distillation.data import BatchRequest, DataSource
from edit_compile.distillation.data.seeding import low_discrepancy, noise_for
from edit_compile.distillation.data.source import CallSource
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import DistillError
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.lora import lora_names
from edit_compile.student.site import converted_sites

if TYPE_CHECKING:
    from accelerate import Accelerator

Denoise = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class NoisyBatch:
    """The inputs of one forward.

    Attributes:
        x: noisy latents, (B, C, H, W); (B, 0) where `conditions` holds them too.
        timesteps: (B,), in [0, 1000).
        conditions: keyword arguments of the model's forward.
        target: what the task loss compares the prediction with, shaped as `x`; None if that is unknown.
    """

    x: Tensor
    timesteps: Tensor
    conditions: dict[str, Any]
    target: Tensor | None


@dataclass(frozen=True)
class Context:
    """The fixed parts of a run.

    Attributes:
        student: the converted model itself, whatever wraps it for training.
        teacher: the model whose original attention is the teacher: the student, unless that is trained as a whole.
        denoise: how a model is called: model, noisy latents, timesteps, conditions -> prediction.
        schedule: what the teacher was trained to predict.
    """

    recipe: Recipe
    student: nn.Module
    teacher: nn.Module
    source: DataSource
    denoise: Denoise
    schedule: NoiseSchedule
    accelerator: Accelerator

    def teacher_mode(self) -> AbstractContextManager[nn.Module]:
        """Run the original attention inside; yields the model to call."""
        return teacher(self.teacher)

    def noisy_batch(self, request: BatchRequest, timesteps: Tensor | None = None) -> NoisyBatch:
        """Read a batch and add noise, on the CPU, at timesteps (B,) or, if None, at the recipe's.

        Raises:
            DistillError: nothing can be read any more, or the model cannot take what is read.
        """
        schedule = self.schedule_at(request.height, request.width, request.frames)
        if timesteps is None:
            u = low_discrepancy(request.positions, self.recipe.seed)
            visited = self.visited(request.height, request.width, request.frames)
            timesteps = schedule.timesteps(u, self.recipe.timesteps.density) if visited is None else visited[among(u, len(visited))]
        if isinstance(self.source, CallSource):
            calls = self.source.recorded(request, timesteps)
            return NoisyBatch(torch.empty(len(timesteps), 0), calls.timesteps, calls.arguments, None)
        batch = self.source.batch(request)
        problem = misfit(self.student, batch.latents, batch.conditions) if self.denoise is denoise else None
        if problem is not None:
            raise DistillError(f"data of kind {self.recipe.data.kind}, or source=, are not this model's: {problem}")
        noise = noise_for(request.positions, batch.latents.shape[1:], self.recipe.seed, request.split)
        x, target = schedule.add_noise(batch.latents, noise, timesteps)
        return NoisyBatch(x, timesteps, batch.conditions, target)

    def schedule_at(self, height: int, width: int, frames: int | None = None) -> NoiseSchedule:
        """Return the noise schedule for images of height x width pixels, or videos of so many frames (default: as many as usual)."""
        if self.schedule.dynamic is None:
            return self.schedule
        return self.schedule.at(math.prod(tokens_of_size(self.student, height, width, frames)))

    def visited(self, height: int, width: int, frames: int | None = None) -> Tensor | None:
        """Return the timesteps (n,), ascending, that the recipe's sampler visits at a size in pixels; None: it trains on all.

        Raises:
            DistillError: what the model's sampler does is not known.
        """
        steps = self.recipe.timesteps.sampler_steps
        return None if steps is None else self.schedule_at(height, width, frames).visited(steps, height, width, frames)

    def on_device(self, batch: NoisyBatch) -> NoisyBatch:
        """Move a batch to the run's device."""
        device = self.accelerator.device
        parts = (batch.x, batch.timesteps, batch.conditions, batch.target)
        return NoisyBatch(*pytree.tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, parts))

    def predict(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        """Run a model on a batch, in the run's precision; returns its prediction (B, C, H, W)."""
        device, half = self.accelerator.device.type, self.recipe.precision == "bf16"
        if device == "meta":  # of dry runs; it has no autocast
            return self.denoise(model, batch.x, batch.timesteps, batch.conditions)
        # Without its cache, which would keep a copy of every weight to the end, whether its block is recomputed or its shards are gone.
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            return self.denoise(model, batch.x, batch.timesteps, batch.conditions)

    def local_batch_slices(self, global_batch_size: int, micro_batch_size: int | None) -> list[range]:
        """Return this process's rows of a global batch, a range for each forward.

        Raises:
            DistillError: the batch is not divisible.
        """
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = samples_per_forward(global_batch_size, micro_batch_size, count)
        turns = range(global_batch_size // (size * count))
        return [range((turn * count + rank) * size, (turn * count + rank + 1) * size) for turn in turns]


def samples_per_forward(global_batch_size: int, micro_batch_size: int | None, processes: int) -> int:
    """Return how many samples of a global batch a process takes at once.

    Raises:
        DistillError: the batch is not divisible.
    """
    size = micro_batch_size or max(global_batch_size // processes, 1)
    if global_batch_size % (size * processes):
        raise DistillError(
            f"global_batch_size {global_batch_size} is not divisible by {processes} processes times micro_batch_size {size}; "
            "change one of them"
        )
    return size


def among(u: Tensor, number: int) -> Tensor:
    """Map u (B,) in [0, 1) to indices (B,) below a number, all of equal shares."""
    return (u * number).long().clamp_(max=number - 1)


def trained_parameters(student: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """Select the parameters that a recipe's `train` names, by name in the model."""
    if train == "all":
        return dict(student.named_parameters())
    within = tuple(f"{path}." for path in (blocks_with_sites(student) if train == "blocks" else converted_sites(student)))
    if train == "inserted":
        within = tuple(f"{path}{ADDED}." for path in within)
    adapters = lora_names(student) if train == "lora" else set()
    numbers = ((name, p) for name, p in student.named_parameters() if p.is_floating_point())
    return {name: p for name, p in numbers if name.startswith(within) or name in adapters}


def blocks_with_sites(student: nn.Module) -> list[str]:
    """List the paths of the repeated blocks that hold converted sites; a site outside of them stands for itself."""
    sites = [f"{path}." for path in converted_sites(student)]
    return [block for block in repeated_blocks(student) if any(site.startswith(f"{block}.") for site in sites)]
