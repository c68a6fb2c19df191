"""Phases: the warm start and the stages, and where each begins in the stream of samples."""

from __future__ import annotations

from dataclasses import dataclass

from edit_compile.distillation.recipe.schema import Losses, Recipe, Stage, WarmStart


@dataclass(frozen=True)
class Phase:
    """A stage or the warm start.

    Attributes:
        height, width: of its pictures in pixels.
        samples: how many the phases before it take from the stream.
        losses: a stage's weights; None for the warm start.
    """

    name: str
    options: Stage | WarmStart
    height: int
    width: int
    samples: int
    losses: Losses | None

    def position(self, step: int) -> int:
        """Where in the stream a step's batch begins."""
        return self.samples + step * self.options.batch


def phases_of(recipe: Recipe) -> list[Phase]:
    """What a recipe does, in order."""
    phases: list[Phase] = []
    warm = recipe.warm_start
    if warm is not None:
        phases.append(Phase("warm start", warm, *(warm.resolution or recipe.stage[0].resolution), 0, None))
    for number, stage in enumerate(recipe.stage):
        samples = phases[-1].position(phases[-1].options.steps) if phases else 0
        phases.append(Phase(f"stage {number}", stage, *stage.resolution, samples, stage.losses))
    return phases
