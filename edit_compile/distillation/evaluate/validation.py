"""Validation: how far a student's predictions are from its teacher's, on samples that training never sees."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edit_compile.distillation.context import Context, NoisyBatch
from edit_compile.distillation.data import BatchRequest
from edit_compile.errors import DistillError


@dataclass(frozen=True)
class TimestepBin:
    """The error over a range of timesteps (low, high)."""

    low: float
    high: float
    error: float


@dataclass(frozen=True)
class ValidationResult:
    """The relative error, sum |student - teacher|^2 / sum |teacher - mean|^2, mean being the teacher's over all that is summed.

    Attributes:
        total: over all timesteps, which the samples cover as the scheduler's steps do: evenly, unless its sigmas are shifted.
        bins: the same over ranges of timesteps, each of as many samples.
        samples: how many.
    """

    total: float
    bins: tuple[TimestepBin, ...]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return {"total": self.total, "buckets": [asdict(one) for one in self.bins], "samples": self.samples}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ValidationResult:
        """Restore what `to_dict` gave."""
        return cls(content["total"], tuple(TimestepBin(**one) for one in content["buckets"]), content["samples"])


def validate(context: Context, height: int, width: int, frames: int | None = None) -> ValidationResult:
    """Measure the student as it is, at a resolution in pixels and a number of frames. All processes take part and get the same answer.

    Raises:
        DistillError: the teacher predicts the same value everywhere, or one of the two NaN or infinity.
    """
    options, schedule = context.recipe.validation, context.schedule_at(height, width, frames)
    sums = torch.zeros(options.timestep_bins, 4, dtype=torch.float64)  # on the CPU: not every device has float64
    u = (torch.arange(options.samples, dtype=torch.float64) + 0.5) / options.samples
    count, rank = context.accelerator.num_processes, context.accelerator.process_index
    batches = [range(i, min(i + options.batch_size, options.samples)) for i in range(0, options.samples, options.batch_size)]
    for turn in range(rank, -(-len(batches) // count) * count, count):
        rows = batches[min(turn, len(batches) - 1)]  # all processes make the same number of forwards, as sharding needs
        own = u[rows.start : rows.stop]
        request = BatchRequest(0, options.samples, rows, height, width, "validation", frames)
        batch = context.noisy_batch(request, schedule.timesteps(own))
        measured = _sums(*_predictions(context, context.on_device(batch)))
        if turn < len(batches):
            sums.index_add_(0, (own * options.timestep_bins).long(), measured)
    if count > 1:
        sums = context.accelerator.reduce(sums.to(context.accelerator.device), "sum").cpu()
    edges = schedule.timesteps(torch.linspace(0, 1, options.timestep_bins + 1, dtype=torch.float64)).tolist()
    bins = tuple(TimestepBin(low, high, _error(row)) for low, high, row in zip(edges, edges[1:], sums, strict=False))
    return ValidationResult(_error(sums.sum(0)), bins, options.samples)


@torch.no_grad()
def _predictions(context: Context, batch: NoisyBatch) -> tuple[Tensor, Tensor]:
    student = context.predict(context.student, batch)
    with context.teacher_mode() as model:
        return student, context.predict(model, batch)


def _sums(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum |student - teacher|^2, teacher, teacher^2 and 1 over the values of every sample: (B, C, H, W) twice to (B, 4) float64."""
    student, teacher = student.cpu().double().flatten(1), teacher.cpu().double().flatten(1)
    number = torch.full_like(teacher[:, 0], teacher.shape[1])
    return torch.stack([(student - teacher).square().sum(1), teacher.sum(1), teacher.square().sum(1), number], 1)


def _error(sums: Tensor) -> float:
    difference, first, second, number = sums.tolist()
    variation = second - first**2 / number
    if not 0 < variation < math.inf:
        raise DistillError("the teacher predicts the same value everywhere, or NaN: there is nothing to distill; are its weights trained?")
    if not math.isfinite(difference):
        raise DistillError("the student predicts NaN or infinity")
    return float(difference / variation)
