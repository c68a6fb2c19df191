"""Trainable state (weights, the optimizer's moments, the moving average) and its serialisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.train.distributed import read_like
from edit_compile.distillation.train.optimizer import GROUP, MovingAverage, Optimizers
from edit_compile.errors import DistillError
from edit_compile.tensor_files import SavedTensors

MODEL, AVERAGE, OPTIMIZER = "model:", "average:", "optimizer:"


@dataclass
class TrainState:
    """A phase's trained parameters by name, its optimizer over them, and the moving average of the weights."""

    trained: dict[str, nn.Parameter]
    optimizer: Optimizers
    average: MovingAverage | None

    def tensors(self) -> dict[str, Tensor]:
        """List all tensors, as they are and where they are."""
        found: dict[str, Tensor] = {MODEL + name: p.detach() for name, p in self.trained.items()}
        if self.average is not None:
            found |= {AVERAGE + name: value for name, value in self.average.average.items()}
        slots = self.optimizer.slots(self.trained)
        return found | {OPTIMIZER + name: value for name, value in slots.items() if isinstance(value, Tensor)}

    def numbers(self) -> dict[str, int | float]:
        """Return what the optimizer keeps besides tensors."""
        return {name: value for name, value in self.optimizer.slots(self.trained).items() if not isinstance(value, Tensor)}

    @torch.no_grad()
    def load(self, saved: SavedTensors, numbers: Mapping[str, int | float]) -> None:
        """Set what `tensors` and `numbers` returned, in however many processes that was; each reads what it needs.

        Raises:
            DistillError: it is not this phase's.
        """
        slots, targets = dict[str, Any](numbers), self.tensors()
        for key in saved.names():
            is_slot = key.startswith(OPTIMIZER)
            slot = key.removeprefix(OPTIMIZER)
            if slot.startswith(GROUP):
                slots[slot] = saved.read(key)
                continue
            like = self.trained.get(slot.rpartition("/")[0]) if is_slot else targets.get(key)
            if like is None or (not is_slot and saved.shape(key) != tuple(like.shape)):
                raise DistillError(f"the checkpoint is not of this run: it has {key} of shape {saved.shape(key)}")
            if is_slot:
                slots[slot] = read_like(saved, key, like)
            else:
                like.copy_(read_like(saved, key, like))
        self.optimizer.set_slots(self.trained, slots)

    def step(self, rate: float) -> None:
        """Update the weights and their average.

        Args:
            rate: the learning rate.
        """
        self.optimizer.step(rate)
        if self.average is not None:
            self.average.update()
