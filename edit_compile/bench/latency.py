"""Teacher against student, timed in one process, turn by turn: what disturbs one run disturbs its partner too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from edit_compile.api import compile as compile_regionally
from edit_compile.api import teacher

_LONG = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds, or a ratio of seconds, over several calls: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    """One picture size. `speedup` is the teacher's seconds over the student's, of calls one right after the other;
    `memory` their peaks in bytes, where the device counts them.
    """

    height: int
    width: int
    teacher: Timing
    student: Timing
    speedup: Timing
    memory: tuple[int, int] | None = None


def compare_speed(
    student: nn.Module,
    inputs_for: Callable[[int, int], Mapping[str, Any]],
    sizes: Sequence[tuple[int, int]],
    *,
    runs: int = 7,
    warm_up: int = 2,
    compiled: bool = False,
) -> list[Row]:
    """Time a converted model against its teacher, size by size.

    Args:
        inputs_for: keyword arguments of one forward for a picture of (height, width).
        runs: calls of each that count; `warm_up` more of each go before.
        compiled: compile the student in place, as `edit_compile.compile` does; the same blocks are compiled for the teacher.
    """
    if compiled:
        compile_regionally(student)
    rows = []
    for height, width in sizes:
        inputs = dict(inputs_for(height, width))
        calls = partial(_taught, student, inputs), partial(student, **inputs)
        rows.append(Row(height, width, *compare_calls(*calls, runs=runs, warm_up=warm_up)))
    return rows


def _taught(student: nn.Module, inputs: Mapping[str, Any]) -> Any:
    with teacher(student):
        return student(**inputs)


@torch.no_grad()
def compare_calls(
    teacher_call: Callable[[], Any], student_call: Callable[[], Any], *, runs: int = 7, warm_up: int = 2
) -> tuple[Timing, Timing, Timing, tuple[int, int] | None]:
    """Time two calls in turns, after a warm-up of both: a Row's teacher, student, speedup and memory."""
    for _ in range(warm_up):
        teacher_call()
        student_call()
    pairs = [(_seconds(teacher_call), _seconds(student_call)) for _ in range(runs)]
    first, second = zip(*pairs, strict=True)
    memory = (_peak(teacher_call), _peak(student_call)) if torch.cuda.is_available() else None
    return Timing.of(first), Timing.of(second), Timing.of([a / b for a, b in pairs]), memory


def matrix_product_speed(dtype: torch.dtype) -> float:
    """FLOPs per second of a product of two square matrices, large if that is fast, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fastest = 0.0
    for size in (256, 512, 1024, 2048, 4096):
        a = torch.ones(size, size, dtype=dtype, device=device)
        product = partial(torch.mm, a, a)
        product()
        seconds = min(_seconds(product), _seconds(product))
        fastest = max(fastest, 2 * size**3 / seconds)
        if seconds > _LONG:  # some CPUs are a hundred times slower in bfloat16
            break
    return fastest


def _seconds(call: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(call: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()
