"""The held-out error: how far a student's predictions are from its teacher's, on samples training never sees."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edit_compile.distillation.context import Context
from edit_compile.distillation.data import Request
from edit_compile.errors import DistillError


@dataclass(frozen=True)
class Bucket:
    """The error over a range of timesteps (low, high)."""

    low: float
    high: float
    error: float


@dataclass(frozen=True)
class HeldOutError:
    """sum |student - teacher|^2 / sum |teacher - mean|^2, mean being the teacher's over all that is summed.

    Attributes:
        total: over all timesteps, which the samples cover as the scheduler's steps do: evenly, unless its sigmas are shifted.
        buckets: the same over ranges of timesteps, each of as many samples.
        samples: how many.
    """

    total: float
    buckets: tuple[Bucket, ...]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> HeldOutError:
        return cls(content["total"], tuple(Bucket(**bucket) for bucket in content["buckets"]), content["samples"])


def held_out_error(context: Context, height: int, width: int) -> HeldOutError:
    """Measure the student as it is, at a resolution in pixels. All processes take part and get the same answer.

    Raises:
        DistillError: the teacher predicts the same value everywhere, or one of the two NaN or infinity.
    """
    options, schedule = context.recipe.validation, context.schedule_at(height, width)
    sums = torch.zeros(options.timestep_bins, 4, dtype=torch.float64)  # on the CPU: not every device has float64
    u = (torch.arange(options.samples, dtype=torch.float64) + 0.5) / options.samples
    count, rank = context.accelerator.num_processes, context.accelerator.process_index
    batches = [range(i, min(i + options.batch_size, options.samples)) for i in range(0, options.samples, options.batch_size)]
    for turn in range(rank, -(-len(batches) // count) * count, count):
        rows = batches[min(turn, len(batches) - 1)]  # all processes make the same number of forwards, as sharding needs
        own = u[rows.start : rows.stop]
        sample = context.draw(Request(0, options.samples, rows, height, width, "held-out"), schedule.timesteps(own))
        measured = _sums(*_predictions(context, context.on_device(sample)))
        if turn < len(batches):
            sums.index_add_(0, (own * options.timestep_bins).long(), measured)
    if count > 1:
        sums = context.accelerator.reduce(sums.to(context.accelerator.device), "sum").cpu()
    edges = schedule.timesteps(torch.linspace(0, 1, options.timestep_bins + 1, dtype=torch.float64)).tolist()
    buckets = tuple(Bucket(low, high, _error(row)) for low, high, row in zip(edges, edges[1:], sums, strict=False))
    return HeldOutError(_error(sums.sum(0)), buckets, options.samples)


@torch.no_grad()
def _predictions(context: Context, sample: Any) -> tuple[Tensor, Tensor]:
    student = context.predict(context.student, sample)
    with context.teaching() as model:
        return student, context.predict(model, sample)


def _sums(student: Tensor, expected: Tensor) -> Tensor:
    """Of every sample: |student - teacher|^2, teacher, teacher^2, and the number of values; (B, 4) float64."""
    student, expected = student.cpu().double().flatten(1), expected.cpu().double().flatten(1)
    number = torch.full_like(expected[:, 0], expected.shape[1])
    return torch.stack([(student - expected).square().sum(1), expected.sum(1), expected.square().sum(1), number], 1)


def _error(sums: Tensor) -> float:
    difference, first, second, number = sums.tolist()
    spread = second - first**2 / number
    if not 0 < spread < math.inf:
        raise DistillError("the teacher predicts the same value everywhere, or NaN: there is nothing to distill; are its weights trained?")
    if not math.isfinite(difference):
        raise DistillError("the student predicts NaN or infinity")
    return difference / spread
