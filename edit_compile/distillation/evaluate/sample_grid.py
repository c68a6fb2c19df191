"""Sample grids: what teacher and student make of the same captions and the same noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation.context import Context, NoisyBatch
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.seeding import noise_for
from edit_compile.progress import each
from edit_compile.report.image_grid import animated_grid, image_grid, save_image


@dataclass
class GridSampler:
    """Samples the first validation captions, always from the same noise. The teacher samples once.

    All processes must take part; the main one writes.
    """

    context: Context
    height: int
    width: int
    frames: int | None = None
    teacher_latents: Tensor | None = field(default=None, init=False)

    def save(self, path: Path, error: float | None = None) -> None:
        """Write a grid as PNG: caption, teacher, student; of videos an animated GIF too, beside it.

        Does nothing where the data has no latents, or they cannot be decoded.

        Args:
            error: the student's, which its heading says.
        """
        context, count = self.context, self.context.recipe.samples.count
        if context.recipe.data.recorded_calls:
            return
        request = BatchRequest(0, count, range(count), self.height, self.width, "validation", self.frames)
        batch = context.source.batch(request)
        if context.source.decode(batch.latents[:1]) is None:
            return
        noise = noise_for(request.positions, batch.latents.shape[1:], context.recipe.seed, "samples")
        start = context.on_device(NoisyBatch(noise, torch.zeros(count), batch.conditions, noise))
        size = (self.height, self.width, self.frames)
        schedule, visited = context.schedule_at(*size), context.visited(*size)
        if self.teacher_latents is None:
            with context.teacher_mode() as model:
                self.teacher_latents = sample(context, schedule, model, start, visited)
        student_latents = sample(context, schedule, context.student, start, visited)
        if context.accelerator.is_main_process:
            name = "student" if error is None else f"student, error {error:.3g}"
            columns = [("teacher", self._images(self.teacher_latents)), (name, self._images(student_latents))]
            captions = batch.captions or [""] * count
            save_image(image_grid(captions, columns), path)
            if columns[0][1][0].ndim == 4:
                first, *further = animated_grid(captions, columns)
                save_image(first, path.with_suffix(".gif"), *further)

    def _images(self, latents: Tensor) -> list[np.ndarray]:
        one_by_one = (self.context.source.decode(one[None]) for one in latents.cpu())  # one fits on any device
        return [images[0].movedim(0, -1).float().numpy() for images in one_by_one if images is not None]


@torch.no_grad()
def sample(context: Context, schedule: NoiseSchedule, model: nn.Module, start: NoisyBatch, visited: Tensor | None = None) -> Tensor:
    """Sample deterministically from noise, without guidance (DDIM, arXiv 2010.02502; for a flow these are Euler's steps).

    Args:
        visited: the timesteps (n,), ascending; None: as many as the recipe's sample grids take, evenly spaced.

    Returns:
        Latents, (B, C, H, W), of videos (B, C, T, H, W).
    """
    x, steps = start.x, context.recipe.samples.steps
    timesteps = schedule.timesteps(1 - torch.arange(steps, dtype=torch.float64) / steps - 1e-6) if visited is None else visited.flip(0)
    pairs = itertools.pairwise([*timesteps.tolist(), None])
    for now, then in each(pairs, f"sampling {len(x)} images", len(timesteps)):
        t = torch.full((len(x),), now, device=x.device)
        prediction = context.predict(model, NoisyBatch(x, t, start.conditions, x)).float()
        x0, noise = schedule.predict_x0_and_noise(x, prediction, t)
        x = x0 if then is None else schedule.add_noise(x0, noise, torch.full_like(t, then))[0]
    return x
