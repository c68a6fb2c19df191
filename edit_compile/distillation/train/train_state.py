"""What changes in training: weights, the optimizer's moments, the moving average; and all of it as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.train.distributed import like, whole
from edit_compile.distillation.train.optimizer import MovingAverage, set_slots, slots_of

MODEL, AVERAGE, OPTIMIZER = "model:", "average:", "optimizer:"


@dataclass
class Live:
    """A phase's trained parameters by name, its optimizer over them, and the moving average."""

    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """All tensors, gathered, on the CPU. All processes must ask; those that do not keep them get nothing."""
        found: dict[str, Tensor] = {MODEL + name: p.detach() for name, p in self.trained.items()}
        if self.average is not None:
            found |= {AVERAGE + name: value for name, value in self.average.average.items()}
        slots = slots_of(self.optimizer, self.trained)
        found |= {OPTIMIZER + name: value for name, value in slots.items() if isinstance(value, Tensor)}
        gathered = ((name, whole(value)) for name, value in found.items())
        return _apart({name: value.cpu().contiguous() for name, value in gathered if keep})

    def numbers(self) -> dict[str, int | float]:
        """What the optimizer keeps that is no tensor."""
        return {name: value for name, value in slots_of(self.optimizer, self.trained).items() if not isinstance(value, Tensor)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int | float]) -> None:
        """The inverse of `tensors` and `numbers`."""
        slots: dict[str, Any] = dict(numbers)
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            if kind + ":" == OPTIMIZER:
                slots[name] = like(value, self.trained[name.rpartition("/")[0]])
            else:
                target = self.trained[name] if kind + ":" == MODEL else self.average.average[name]  # type: ignore[union-attr]
                target.copy_(like(value, target))
        set_slots(self.optimizer, self.trained, slots)

    def step(self, rate: float) -> None:
        """Update weights and average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without shared memory, which safetensors refuses: 8-bit optimizers have one table for many parameters."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
    return tensors
