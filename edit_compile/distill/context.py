"""What every part of a run needs: the models, the data, the noise, the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.distill.data import Request, Source
from edit_compile.distill.noise import Process, noise_for, spread
from edit_compile.distill.recipe import Recipe
from edit_compile.errors import DistillError
from edit_compile.passes.rewrite import ADDED
from edit_compile.sites import converted_sites

if TYPE_CHECKING:
    from accelerate import Accelerator

Denoise = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Sample:
    """The inputs of one forward, on the device. `target` is what the task loss compares with."""

    x: Tensor
    times: Tensor
    conditions: dict[str, Any]
    target: Tensor


@dataclass(frozen=True)
class Context:
    """The fixed parts of a run.

    Attributes:
        student: the converted model itself, whatever wraps it for training.
        denoise: how it is called: model, noisy pictures, timesteps, conditions -> prediction.
        process: what its teacher was trained to predict.
    """

    recipe: Recipe
    student: nn.Module
    source: Source
    denoise: Denoise
    process: Process
    accelerator: Accelerator

    def sample(self, request: Request, times: Tensor | None = None) -> Sample:
        """The request's pictures with noise, at timesteps (B,) or, if None, at the recipe's."""
        batch = self.source.batch(request)
        if times is None:
            times = self.process.times(spread(request.positions, self.recipe.seed), self.recipe.timesteps)
        noise = noise_for(request.positions, batch.pictures.shape[1:], self.recipe.seed, request.split)
        x, target = self.process.mixed(batch.pictures, noise, times)
        return Sample(*pytree.tree_map(self._on_device, (x, times, batch.conditions, target)))

    def _on_device(self, leaf: Any) -> Any:
        return leaf.to(self.accelerator.device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    def predict(self, model: nn.Module, sample: Sample) -> Tensor:
        """A model's prediction, in the run's precision."""
        with self.accelerator.autocast():
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
    sites = tuple(f"{path}." if train == "attention" else f"{path}.{ADDED}." for path in converted_sites(student))
    return {name: p for name, p in student.named_parameters() if name.startswith(sites)}
