"""Sample grids: what teacher and student make of the same captions and the same noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation.context import Context, NoisyBatch
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.seeding import noise_for
from edit_compile.progress import each
from edit_compile.report.image_grid import animated_grid, image_grid, save_image


class Start(NamedTuple):
    """What sampling begins with.

    Attributes:
        captions: one for each sample; empty where the data does not tell them.
        batch: noise and conditions, on the run's device.
        empty: the same with the empty caption; None without guidance.
        guidance: its scale.
        schedule: at the samples' size.
        timesteps: (n,), descending.
    """

    captions: tuple[str, ...]
    batch: NoisyBatch
    empty: NoisyBatch | None
    guidance: float
    schedule: NoiseSchedule
    timesteps: Tensor


def start_of(context: Context, count: int, height: int, width: int, frames: int | None = None) -> Start | None:
    """Read the first validation captions, and draw noise that is always the same; None where nothing decodes the data's latents.

    The timesteps are those that the recipe's sampler visits, or as many as its sample grids take, evenly spaced.
    """
    request = BatchRequest(0, count, range(count), height, width, "validation", frames)
    batch = context.source.batch(request)
    if context.source.decode(batch.latents[:1]) is None:
        return None
    noise = noise_for(range(count), batch.latents.shape[1:], context.recipe.seed, "samples")
    schedule, visited = context.schedule_at(height, width, frames), context.visited(height, width, frames)
    steps = context.recipe.samples.steps
    timesteps = schedule.timesteps(1 - torch.arange(steps, dtype=torch.float64) / steps - 1e-6) if visited is None else visited.flip(0)

    def noisy(conditions: dict[str, Any]) -> NoisyBatch:
        return context.on_device(NoisyBatch(noise, torch.zeros(count), conditions, noise))

    guidance = context.recipe.samples.guidance
    empty = None if guidance is None else noisy(context.source.batch(replace(request, empty_captions=True)).conditions)
    return Start(tuple(batch.captions or [""] * count), noisy(batch.conditions), empty, guidance or 0.0, schedule, timesteps)


@torch.no_grad()
def sample(context: Context, model: nn.Module, start: Start) -> Tensor:
    """Sample deterministically from noise (DDIM, arXiv 2010.02502; for a flow these are Euler's steps).

    Returns:
        Latents, (B, C, H, W), of videos (B, C, T, H, W).
    """
    x, schedule = start.batch.x, start.schedule
    pairs = itertools.pairwise([*start.timesteps.tolist(), None])
    for now, then in each(pairs, f"sampling {len(x)} images", len(start.timesteps)):
        t = torch.full((len(x),), now, device=x.device)
        prediction = context.predict(model, NoisyBatch(x, t, start.batch.conditions, x)).float()
        if start.empty is not None:
            unguided = context.predict(model, NoisyBatch(x, t, start.empty.conditions, x)).float()
            prediction = unguided + start.guidance * (prediction - unguided)
        x0, noise = schedule.predict_x0_and_noise(x, prediction, t)
        x = x0 if then is None else schedule.add_noise(x0, noise, torch.full_like(t, then))[0]
    return x


def decoded(context: Context, latents: Tensor) -> list[np.ndarray]:
    """Decode latents one by one, since one fits on any device: images (H, W, 3), or videos (T, H, W, 3), in [0, 1]."""
    one_by_one = (context.source.decode(one[None]) for one in latents.cpu())
    return [images[0].movedim(0, -1).float().numpy() for images in one_by_one if images is not None]


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
        context = self.context
        if context.recipe.data.recorded_calls:
            return
        start = start_of(context, context.recipe.samples.count, self.height, self.width, self.frames)
        if start is None:
            return
        if self.teacher_latents is None:
            with context.teacher_mode() as model:
                self.teacher_latents = sample(context, model, start)
        student_latents = sample(context, context.student, start)
        if context.accelerator.is_main_process:
            name = "student" if error is None else f"student, error {error:.3g}"
            columns = [("teacher", decoded(context, self.teacher_latents)), (name, decoded(context, student_latents))]
            save_image(image_grid(start.captions, columns), path)
            if columns[0][1][0].ndim == 4:
                first, *further = animated_grid(start.captions, columns)
                save_image(first, path.with_suffix(".gif"), *further)
