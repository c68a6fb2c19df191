"""Sample grids: what teacher and student draw from the same captions and the same noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation.context import Context, Sample
from edit_compile.distillation.data import Request
from edit_compile.distillation.data.seeding import noise_for
from edit_compile.report.image_grid import image_grid, save_image


@dataclass
class Sampler:
    """Draws the first held-out captions, always the same ones from the same noise. The teacher draws once.

    All processes must take part; the main one writes.
    """

    context: Context
    height: int
    width: int
    teachers: Tensor | None = field(default=None, init=False)

    def save(self, path: Path) -> None:
        """A grid as PNG: caption, teacher, student. None where the data's latents cannot be decoded."""
        context, count = self.context, self.context.recipe.samples.count
        request = Request(0, count, range(count), self.height, self.width, "held-out")
        batch = context.source.batch(request)
        if context.source.pixels(batch.pictures[:1]) is None:
            return
        noise = noise_for(request.positions, batch.pictures.shape[1:], context.recipe.seed, "samples")
        start = context.on_device(Sample(noise, torch.zeros(count), batch.conditions, noise))
        schedule = context.schedule_at(self.height, self.width)
        if self.teachers is None:
            with context.teaching() as model:
                self.teachers = draw(context, schedule, model, start)
        students = draw(context, schedule, context.student, start)
        if context.accelerator.is_main_process:
            columns = [("teacher", self._pixels(self.teachers)), ("student", self._pixels(students))]
            save_image(image_grid(batch.captions or [""] * count, columns), path)

    def _pixels(self, pictures: Tensor) -> list[np.ndarray]:
        one_by_one = (self.context.source.pixels(picture) for picture in pictures.cpu().split(1))  # as many as fit on any device
        return [found[0].permute(1, 2, 0).float().numpy() for found in one_by_one if found is not None]


@torch.no_grad()
def draw(context: Context, schedule: NoiseSchedule, model: nn.Module, start: Sample) -> Tensor:
    """Deterministic sampling from noise without guidance (DDIM, arXiv 2010.02502; for a flow these are Euler's steps)."""
    x = start.x
    steps = schedule.timesteps(1 - torch.arange(context.recipe.samples.steps, dtype=torch.float64) / context.recipe.samples.steps - 1e-6)
    for now, then in itertools.pairwise([*steps.tolist(), None]):
        times = torch.full((len(x),), now, device=x.device)
        prediction = context.predict(model, Sample(x, times, start.conditions, x)).float()
        picture, noise = schedule.predict_x0_and_noise(x, prediction, times)
        x = picture if then is None else schedule.add_noise(picture, noise, torch.full_like(times, then))[0]
    return x
