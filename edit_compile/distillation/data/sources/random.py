"""Data of kind `random`: noise of the right shapes, for measuring a recipe's speed and memory before there is data."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from edit_compile.adapters.denoise import random_batch
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import Batch, Request
from edit_compile.errors import DistillError, GridError, NoExampleInputsError
from edit_compile.frozen import Frozen


class RandomData(Frozen):
    """Nothing can be learned from it; models of which only the structure is known may be tried with it, at random weights."""

    kind: Literal["random"]


class Random:
    """Every sample is drawn from a generator seeded by its position."""

    concurrent = False  # the generator is torch's own

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self.skipped: dict[str, str] = {}

    def check(self, height: int, width: int) -> None:
        try:
            random_batch(self.model, height, width, 1, "meta")
        except (GridError, NoExampleInputsError) as error:
            raise DistillError(str(error)) from error

    def batch(self, request: Request) -> Batch:
        samples = [self._sample(request, position) for position in request.positions]
        return Batch(*tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], *samples))

    def pixels(self, pictures: Tensor) -> None:
        return None

    def _sample(self, request: Request, position: int) -> tuple[Tensor, dict[str, Any]]:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(self.seed, request.split, position))
            return random_batch(self.model, request.height, request.width, 1)
