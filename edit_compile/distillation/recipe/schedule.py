"""The schedule of a recipe: the layerwise fit and the stages, and where each begins in the stream of samples."""

from __future__ import annotations

from dataclasses import dataclass

from edit_compile.distillation.recipe.schema import LayerwiseFit, Recipe, Stage


@dataclass(frozen=True)
class Phase:
    """A stage or the layerwise fit.

    Attributes:
        height, width: of its images, in pixels.
        frames: of its videos, if the recipe says how many.
        samples: how many samples of the stream the phases before it take.
        losses: a stage's weights; None for the layerwise fit.
    """

    name: str
    options: Stage | LayerwiseFit
    height: int
    width: int
    samples: int
    losses: dict[str, float] | None
    frames: int | None = None

    def position(self, step: int) -> int:
        """Return where in the stream a step's batch begins."""
        return self.samples + step * self.options.global_batch_size


def phases_of(recipe: Recipe) -> list[Phase]:
    """List the phases of a recipe, in order."""
    of_data = recipe.data.video_frames
    phases: list[Phase] = []
    fit = recipe.layerwise
    if fit is not None:
        first = recipe.stages[0]
        phases.append(Phase("layerwise fit", fit, *(fit.resolution or first.resolution), 0, None, fit.frames or first.frames or of_data))
    for number, stage in enumerate(recipe.stages):
        samples = phases[-1].position(phases[-1].options.steps) if phases else 0
        phases.append(Phase(f"stage {number}", stage, *stage.resolution, samples, stage.losses, stage.frames or of_data))
    return phases


def total_steps(recipe: Recipe) -> int:
    """Count the steps of all phases."""
    return sum(phase.options.steps for phase in phases_of(recipe))
