"""How long a forward takes, teacher and student, as they are at the end of a run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from edit_compile.distill.context import Context, Sample
from edit_compile.distill.data import Request
from edit_compile.distill.phases import phases_of

_REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Seconds of one forward of one picture, medians, at a resolution in pixels."""

    height: int
    width: int
    teacher: float
    student: float


def speeds(context: Context) -> tuple[Speed, ...]:
    """At each stage's resolution, compiled if the recipe says so. All processes must take part."""
    found = []
    for height, width in dict.fromkeys((phase.height, phase.width) for phase in phases_of(context.recipe) if phase.losses is not None):
        sample = context.on_device(context.draw(Request(0, 1, range(1), height, width, "held-out")))
        with context.teaching() as model:
            teacher = _seconds(context, model, sample)
        found.append(Speed(height, width, teacher, _seconds(context, context.student, sample)))
    return tuple(found)


@torch.no_grad()
def _seconds(context: Context, model: nn.Module, sample: Sample) -> float:
    times = []
    for _ in range(2 + _REPEATS):
        start = time.perf_counter()
        context.predict(model, sample)
        if context.accelerator.device.type == "cuda":
            torch.cuda.synchronize(context.accelerator.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
