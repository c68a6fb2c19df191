"""Data of kind `random`: noise of the right shapes, for measuring a recipe's speed and memory before there is data."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from edit_compile.adapters.denoise import random_batch
from edit_compile.distillation.data.registry import DataConfig, register_data
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import Batch, BatchRequest, DataSource, SourceContext
from edit_compile.errors import DistillError, GridError, NoExampleInputsError


@register_data("random")
class RandomData(DataConfig):
    """Nothing can be learned from it. Models of which only the structure is known can be tried on it, with random weights."""

    kind: Literal["random"]

    random_weights: ClassVar[bool] = True

    def open(self, context: SourceContext) -> DataSource:
        """Open the source."""
        return RandomSource(context.model, context.seed)


class RandomSource:
    """Draws every sample from a generator seeded by its position."""

    concurrent = False  # the generator is torch's global one

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self.skipped: dict[str, str] = {}

    def check(self, height: int, width: int, frames: int | None = None) -> None:
        try:
            random_batch(self.model, height, width, 1, "meta", frames=frames)
        except (GridError, NoExampleInputsError) as error:
            raise DistillError(str(error)) from error

    def batch(self, request: BatchRequest) -> Batch:
        samples = [self._sample(request, position) for position in request.positions]
        return Batch(*tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], *samples))

    def decode(self, latents: Tensor) -> None:
        return None

    def _sample(self, request: BatchRequest, position: int) -> tuple[Tensor, dict[str, Any]]:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(self.seed, "random", request.split, position))  # the noise has a seed of its own
            return random_batch(self.model, request.height, request.width, 1, frames=request.frames)
