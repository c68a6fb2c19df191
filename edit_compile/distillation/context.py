"""What every part of a run needs: the models, the data, the noise, the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.adapters.inputs import pixels_per_token
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.api import teacher
from edit_compile.distillation.data import Request, Source
from edit_compile.distillation.data.seeding import noise_for, spread
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import DistillError
from edit_compile.passes.rewrite import ADDED
from edit_compile.student.site import converted_sites

if TYPE_CHECKING:
    from accelerate import Accelerator

Denoise = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Sample:
    """The inputs of one forward. `target` is what the task loss compares with."""

    x: Tensor
    times: Tensor
    conditions: dict[str, Any]
    target: Tensor


@dataclass(frozen=True)
class Context:
    """The fixed parts of a run.

    Attributes:
        student: the converted model itself, whatever wraps it for training.
        teacher: the model whose original attention is the teacher: the student, unless that is trained as a whole.
        denoise: how a model is called: model, noisy pictures, timesteps, conditions -> prediction.
        schedule: what the teacher was trained to predict.
    """

    recipe: Recipe
    student: nn.Module
    teacher: nn.Module
    source: Source
    denoise: Denoise
    schedule: NoiseSchedule
    accelerator: Accelerator

    def teaching(self) -> AbstractContextManager[nn.Module]:
        """Inside, the model given runs its original attention."""
        return teacher(self.teacher)

    def draw(self, request: Request, times: Tensor | None = None) -> Sample:
        """The request's pictures with noise, on the CPU, at timesteps (B,) or, if None, at the recipe's."""
        batch, schedule = self.source.batch(request), self.schedule_at(request.height, request.width)
        if times is None:
            times = schedule.timesteps(spread(request.positions, self.recipe.seed), self.recipe.timesteps)
        noise = noise_for(request.positions, batch.pictures.shape[1:], self.recipe.seed, request.split)
        x, target = schedule.add_noise(batch.pictures, noise, times)
        return Sample(x, times, batch.conditions, target)

    def schedule_at(self, height: int, width: int) -> NoiseSchedule:
        """The noise schedule for images of height x width pixels."""
        if self.schedule.dynamic is None:
            return self.schedule
        step = pixels_per_token(self.student)
        return self.schedule.at((height // step) * (width // step))

    def on_device(self, sample: Sample) -> Sample:
        """The sample on the run's device."""
        device = self.accelerator.device
        parts = (sample.x, sample.times, sample.conditions, sample.target)
        return Sample(*pytree.tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, parts))

    def predict(self, model: nn.Module, sample: Sample) -> Tensor:
        """A model's prediction, in the run's precision."""
        device, half = self.accelerator.device.type, self.recipe.precision == "bf16"
        if device == "meta":  # of dry runs; it has no autocast
            return self.denoise(model, sample.x, sample.times, sample.conditions)
        # Without its cache, which would keep a copy of every weight to the end, whether its block is recomputed or its shards are gone.
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            return self.denoise(model, sample.x, sample.times, sample.conditions)

    def own_rows(self, batch: int, micro_batch: int | None) -> list[range]:
        """This process' rows of a global batch, a range for each forward.

        Raises:
            DistillError: the batch does not divide.
        """
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = micro_batch or max(batch // count, 1)
        if batch % (size * count):
            raise DistillError(
                f"a batch of {batch} does not divide into forwards of {size} on {count} processes; change batch or micro_batch"
            )
        return [range((turn * count + rank) * size, (turn * count + rank + 1) * size) for turn in range(batch // (size * count))]


def trained_parameters(student: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """The parameters that a recipe's `train` selects, by name in the model."""
    if train == "all":
        return dict(student.named_parameters())
    sites = tuple(f"{path}." if train == "attention" else f"{path}.{ADDED}." for path in converted_sites(student))
    return {name: p for name, p in student.named_parameters() if name.startswith(sites)}
