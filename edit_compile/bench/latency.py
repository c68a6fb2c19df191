"""Teacher against student, timed by alternating calls in one process: what disturbs one call disturbs its partner too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.family import Extent
from edit_compile.adapters.inputs import default_sizes, inputs_for_size
from edit_compile.api import compile as compile_regionally
from edit_compile.api import teacher, transformer_of
from edit_compile.bench.turns import seconds_of

_LONG = 0.05


@dataclass(frozen=True)
class Timing:
    """The median and the quartiles of seconds, or of a ratio of seconds, over several calls."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
        return cls(median, low, high)


@dataclass(frozen=True)
class SpeedRow:
    """Teacher and student at one size of images or videos.

    Attributes:
        height, width: in pixels.
        teacher, student: seconds of one forward.
        speedup: the teacher's seconds over the student's, of calls one right after the other.
        memory: peaks of teacher and student in bytes, where the device counts them.
        frames: of a video; None for an image.
    """

    height: int
    width: int
    teacher: Timing
    student: Timing
    speedup: Timing
    memory: tuple[int, int] | None = None
    frames: int | None = None


def compare_speed(
    student: Any,
    sizes: Sequence[Extent] | None = None,
    *,
    inputs_for: Callable[..., Mapping[str, Any]] | None = None,
    runs: int = 7,
    warmup: int = 2,
    compiled: bool = False,
) -> list[SpeedRow]:
    """Time a converted model against its teacher, size by size.

    Args:
        student: a converted model, or a pipeline with one.
        sizes: (height, width) in pixels, or of videos (frames, height, width); default: those the model is used at.
        inputs_for: keyword arguments of one forward, from the numbers of a size; default: random ones, for models with an adapter.
        runs: timed calls of each, after `warmup` more.
        compiled: compile the student in place, as `edit_compile.compile` does; the same blocks are compiled for the teacher.

    Raises:
        NoExampleInputsError: sizes or inputs_for are not given, and the model's family has no adapter.
        GridError: the model cannot take a size.
    """
    model = transformer_of(student)
    if compiled:
        compile_regionally(model)
    inputs_for = inputs_for or partial(_random_inputs, model)
    rows = []
    for size in sizes if sizes is not None else default_sizes(model):
        *frames, height, width = size
        inputs = dict(inputs_for(*size))
        calls = partial(_call_teacher, model, inputs), partial(model, **inputs)
        rows.append(SpeedRow(height, width, *compare_calls(*calls, runs=runs, warmup=warmup), *frames))
    return rows


def _random_inputs(model: nn.Module, *size: int) -> dict[str, Any]:
    *frames, height, width = size
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return inputs_for_size(model, height, width, frames=frames[0] if frames else None, device=weight.device, dtype=weight.dtype).inputs


def _call_teacher(student: nn.Module, inputs: Mapping[str, Any]) -> Any:
    with teacher(student):
        return student(**inputs)


@torch.no_grad()
def compare_calls(
    teacher_call: Callable[[], Any], student_call: Callable[[], Any], *, runs: int = 7, warmup: int = 2
) -> tuple[Timing, Timing, Timing, tuple[int, int] | None]:
    """Time two calls by turns, after a warm-up of both: the teacher, student, speedup and memory of a SpeedRow."""
    for _ in range(warmup):
        teacher_call()
        student_call()
    device = _device()
    pairs = [(seconds_of(teacher_call, device), seconds_of(student_call, device)) for _ in range(runs)]
    first, second = zip(*pairs, strict=True)
    memory = (_peak(teacher_call), _peak(student_call)) if torch.cuda.is_available() else None
    return Timing.of(first), Timing.of(second), Timing.of([a / b for a, b in pairs]), memory


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """Measure a product of two square matrices, on the GPU if there is one: the fastest of several sizes."""
    device, fastest = _device(), 0.0
    for size in (256, 512, 1024, 2048, 4096):
        a = torch.ones(size, size, dtype=dtype, device=device)
        product = partial(torch.mm, a, a)
        product()
        seconds = min(seconds_of(product, device), seconds_of(product, device))
        fastest = max(fastest, 2 * size**3 / seconds)
        if seconds > _LONG:  # some CPUs are a hundred times slower in bfloat16
            break
    return fastest


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak(call: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()
