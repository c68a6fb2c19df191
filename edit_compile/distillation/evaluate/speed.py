"""The seconds of one forward, teacher and student, at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from edit_compile.bench import compare_calls, size_in_words, video_size
from edit_compile.distillation.context import Context, NoisyBatch
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.progress import each

_RUNS = 5
COLUMNS = ("resolution", "teacher, ms", "student, ms", "speed-up")  # of `Speed.row`


@dataclass(frozen=True)
class Speed:
    """The median seconds of a forward of one image or video, at a resolution in pixels."""

    height: int
    width: int
    teacher: float
    student: float
    frames: int | None = None

    @property
    def size(self) -> str:
        """The size in words: "height x width", after the number of a video's frames."""
        return size_in_words(video_size(self.height, self.width, self.frames))

    @property
    def speedup(self) -> str:
        """The teacher's time over the student's."""
        return f"{self.teacher / self.student:.2f}x"

    @property
    def row(self) -> tuple[str, str, str, str]:
        """What tables have in the columns `COLUMNS`."""
        return f"{self.size} px", f"{1000 * self.teacher:,.1f}", f"{1000 * self.student:,.1f}", self.speedup


def measure_speeds(context: Context) -> tuple[Speed, ...]:
    """Measure at each stage's resolution, compiled if the recipe says so. All processes must take part."""
    found = []
    stages = [phase for phase in phases_of(context.recipe) if phase.losses is not None]
    sizes = dict.fromkeys((stage.height, stage.width, stage.frames) for stage in stages)
    for height, width, frames in each(sizes, "timing teacher and student", len(sizes)):
        batch = context.on_device(context.noisy_batch(BatchRequest(0, 1, range(1), height, width, "validation", frames)))
        teacher, student, *_ = compare_calls(
            partial(_run_teacher, context, batch), partial(context.predict, context.student, batch), runs=_RUNS
        )
        found.append(Speed(height, width, teacher.median, student.median, frames))
    return tuple(found)


def _run_teacher(context: Context, batch: NoisyBatch) -> None:
    with context.teacher_mode() as model:
        context.predict(model, batch)
