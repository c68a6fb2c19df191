"""Validation: how far a student's predictions are from its teacher's, on samples that training never sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from edit_compile.distillation.context import Context, NoisyBatch, among
from edit_compile.distillation.data import BatchRequest
from edit_compile.errors import DistillError
from edit_compile.progress import each

MEASURE = "sum |student - teacher|² / sum |teacher - mean|² of the predictions, on samples that training never saw"


@dataclass(frozen=True)
class TimestepBin:
    """The error over a range of timesteps (low, high), or at one, low and high."""

    low: float
    high: float
    error: float

    @property
    def timesteps(self) -> str:
        """The range in words."""
        return f"{self.low:.0f}" if self.low == self.high else f"{self.low:.0f} to {self.high:.0f}"


@dataclass(frozen=True)
class ValidationResult:
    """The relative error, sum |student - teacher|^2 / sum |teacher - mean|^2, mean being the teacher's over all that is summed.

    Attributes:
        total: over all timesteps, which the samples cover as the scheduler's steps do: evenly, unless its sigmas are shifted; or
            over those that the sampler visits, if the recipe trains on these.
        bins: the same over ranges of timesteps, each of as many samples.
        samples: how many.
        resolutions: the total at each further resolution of the recipe, by its name: "128 x 128".
    """

    total: float
    bins: tuple[TimestepBin, ...]
    samples: int
    resolutions: Mapping[str, float] = field(default_factory=dict)

    def rows_until(self, after: ValidationResult) -> list[tuple[str, str, str]]:
        """Name the errors and give each as this result has it, and as a later one does, with three significant digits."""
        rows = [("all", self.total, after.total)]
        rows += [(f"timesteps {b.timesteps}", b.error, a.error) for b, a in zip(self.bins, after.bins, strict=True)]
        rows += [(f"all, at {size} px", self.resolutions[size], error) for size, error in after.resolutions.items()]
        return [(name, f"{before:.3g}", f"{later:.3g}") for name, before, later in rows]

    def to_dict(self) -> dict[str, Any]:
        bins = [asdict(one) for one in self.bins]
        return {"total": self.total, "timestep_bins": bins, "samples": self.samples, "resolutions": dict(self.resolutions)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ValidationResult:
        """Restore what `to_dict` gave."""
        bins = tuple(TimestepBin(**one) for one in content["timestep_bins"])
        return cls(content["total"], bins, content["samples"], content["resolutions"])


def validation_batches(context: Context) -> list[range]:
    """List the batches of the validation samples, each as the numbers of its samples."""
    options = context.recipe.validation
    return [range(i, min(i + options.batch_size, options.samples)) for i in range(0, options.samples, options.batch_size)]


def samples_of(context: Context, height: int, width: int, frames: int | None, rows: range) -> tuple[Tensor, NoisyBatch]:
    """Read some of the validation samples, at their timesteps, on the run's device; returns also their bins of timesteps, (B,)."""
    options, bins = context.recipe.validation, _Bins(context, height, width, frames)
    u = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) / options.samples
    request = BatchRequest(0, options.samples, rows, height, width, "validation", frames)
    return bins.of(u), context.on_device(context.noisy_batch(request, bins.timesteps(u)))


class _Bins:
    """The timesteps of validation and their ranges: evenly over the scheduler's, or the few that the recipe's sampler visits."""

    def __init__(self, context: Context, height: int, width: int, frames: int | None) -> None:
        self.schedule = context.schedule_at(height, width, frames)
        self.visited = context.visited(height, width, frames)
        number = context.recipe.validation.timestep_bins
        if self.visited is None:
            edges = self.schedule.timesteps(torch.linspace(0, 1, number + 1, dtype=torch.float64)).tolist()
            self.ranges = list(itertools.pairwise(edges))
        else:
            parts = self.visited.tensor_split(min(number, len(self.visited)))
            self.ranges = [(part[0].item(), part[-1].item()) for part in parts]

    def timesteps(self, u: Tensor) -> Tensor:
        """Map u (B,) in [0, 1) to timesteps (B,)."""
        return self.schedule.timesteps(u) if self.visited is None else self.visited[among(u, len(self.visited))]

    def of(self, u: Tensor) -> Tensor:
        """Map u (B,) in [0, 1) to the numbers (B,) of the ranges that its timesteps are in."""
        if self.visited is None:
            return among(u, len(self.ranges))
        return torch.bucketize(self.timesteps(u), torch.tensor([high for _, high in self.ranges]))


def validate_everywhere(context: Context, height: int, width: int, frames: int | None = None) -> ValidationResult:
    """Do `validate`, and measure the total error at the recipe's further resolutions as well."""
    further = {f"{h} x {w}": validate(context, h, w, frames).total for h, w in context.recipe.validation.resolutions}
    return replace(validate(context, height, width, frames), resolutions=further)


def validate(context: Context, height: int, width: int, frames: int | None = None) -> ValidationResult:
    """Measure the student as it is, at a resolution in pixels and a number of frames. All processes take part and get the same answer.

    Raises:
        DistillError: the teacher predicts the same value everywhere, or one of the two NaN or infinity.
    """
    ranges = _Bins(context, height, width, frames).ranges
    sums = torch.zeros(len(ranges), 4, dtype=torch.float64)  # on the CPU: not every device has float64
    count, rank = context.accelerator.num_processes, context.accelerator.process_index
    batches = validation_batches(context)
    turns = range(rank, -(-len(batches) // count) * count, count)
    for turn in each(turns, f"measuring the error at {height} x {width} px", len(turns)):
        rows = batches[min(turn, len(batches) - 1)]  # all processes make the same number of forwards, as sharding needs
        bins, batch = samples_of(context, height, width, frames, rows)
        measured = error_sums(*_predictions(context, batch))
        if turn < len(batches):
            sums.index_add_(0, bins, measured)
    if count > 1:
        sums = context.accelerator.reduce(sums.to(context.accelerator.device), "sum").cpu()
    found = tuple(TimestepBin(low, high, error_of(row)) for (low, high), row in zip(ranges, sums, strict=True))
    return ValidationResult(error_of(sums.sum(0)), found, context.recipe.validation.samples)


@torch.no_grad()
def _predictions(context: Context, batch: NoisyBatch) -> tuple[Tensor, Tensor]:
    student = context.predict(context.student, batch)
    with context.teacher_mode() as model:
        return student, context.predict(model, batch)


def error_sums(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum |student - teacher|^2, teacher, teacher^2 and 1 over the values of every sample: (B, C, H, W) twice to (B, 4) float64."""
    student, teacher = student.cpu().double().flatten(1), teacher.cpu().double().flatten(1)
    number = torch.full_like(teacher[:, 0], teacher.shape[1])
    return torch.stack([(student - teacher).square().sum(1), teacher.sum(1), teacher.square().sum(1), number], 1)


def error_of(sums: Tensor) -> float:
    """Compute the relative error from what `error_sums` gave, summed over samples, (4,).

    Raises:
        DistillError: the teacher predicts the same value everywhere, or one of the two NaN or infinity.
    """
    difference, first, second, number = sums.tolist()
    variation = second - first**2 / number
    if not 0 < variation < math.inf:
        raise DistillError("the teacher predicts the same value everywhere, or NaN: there is nothing to distill; are its weights trained?")
    if not math.isfinite(difference):
        raise DistillError("the student predicts NaN or infinity")
    return float(difference / variation)
