"""The seconds of one forward, teacher and student, at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from edit_compile.bench import compare_calls
from edit_compile.distillation.context import Context, NoisyBatch
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.recipe.schedule import phases_of

_RUNS = 5


@dataclass(frozen=True)
class Speed:
    """The median seconds of a forward of one image, at a resolution in pixels."""

    height: int
    width: int
    teacher: float
    student: float


def measure_speeds(context: Context) -> tuple[Speed, ...]:
    """Measure at each stage's resolution, compiled if the recipe says so. All processes must take part."""
    found = []
    for height, width in dict.fromkeys((phase.height, phase.width) for phase in phases_of(context.recipe) if phase.losses is not None):
        batch = context.on_device(context.noisy_batch(BatchRequest(0, 1, range(1), height, width, "validation")))
        teacher, student, *_ = compare_calls(
            partial(_run_teacher, context, batch), partial(context.predict, context.student, batch), runs=_RUNS
        )
        found.append(Speed(height, width, teacher.median, student.median))
    return tuple(found)


def _run_teacher(context: Context, batch: NoisyBatch) -> None:
    with context.teacher_mode() as model:
        context.predict(model, batch)
