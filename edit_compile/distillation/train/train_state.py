"""Trainable state (weights, the optimizer's moments, the moving average) and its serialisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.train.distributed import distribute_like, gather_full
from edit_compile.distillation.train.optimizer import MovingAverage, Optimizers

MODEL, AVERAGE, OPTIMIZER = "model:", "average:", "optimizer:"


@dataclass
class TrainState:
    """A phase's trained parameters by name, its optimizer over them, and the moving average of the weights."""

    trained: dict[str, nn.Parameter]
    optimizer: Optimizers
    average: MovingAverage | None

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Gather all tensors on the CPU. All processes must call this; those that do not keep the tensors get none."""
        found: dict[str, Tensor] = {MODEL + name: p.detach() for name, p in self.trained.items()}
        if self.average is not None:
            found |= {AVERAGE + name: value for name, value in self.average.average.items()}
        slots = self.optimizer.slots(self.trained)
        found |= {OPTIMIZER + name: value for name, value in slots.items() if isinstance(value, Tensor)}
        gathered = ((name, gather_full(value)) for name, value in found.items())
        return _unshared({name: value.cpu().contiguous() for name, value in gathered if keep})

    def numbers(self) -> dict[str, int | float]:
        """Return what the optimizer keeps besides tensors."""
        return {name: value for name, value in self.optimizer.slots(self.trained).items() if not isinstance(value, Tensor)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int | float]) -> None:
        """Set what `tensors` and `numbers` returned."""
        slots: dict[str, Any] = dict(numbers)
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            if kind + ":" == OPTIMIZER:
                slots[name] = distribute_like(value, self.trained[name.rpartition("/")[0]])
            else:
                target = self.trained[name] if kind + ":" == MODEL else self.average.average[name]  # type: ignore[union-attr]
                target.copy_(distribute_like(value, target))
        self.optimizer.set_slots(self.trained, slots)

    def step(self, rate: float) -> None:
        """Update the weights and their average.

        Args:
            rate: the learning rate.
        """
        self.optimizer.step(rate)
        if self.average is not None:
            self.average.update()


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory, which safetensors refuses: 8-bit optimizers have one table for many parameters."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
    return tensors
