"""How long a forward takes, teacher and student, as they are at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from edit_compile.bench import compare_calls
from edit_compile.distillation.context import Context, Sample
from edit_compile.distillation.data import Request
from edit_compile.distillation.recipe.schedule import phases_of

_RUNS = 5


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
        teacher, student, *_ = compare_calls(
            partial(_taught, context, sample), partial(context.predict, context.student, sample), runs=_RUNS
        )
        found.append(Speed(height, width, teacher.median, student.median))
    return tuple(found)


def _taught(context: Context, sample: Sample) -> None:
    with context.teaching() as model:
        context.predict(model, sample)
