"""Data of kinds `shapes` and `moving-shapes`: the demos' coloured shapes with captions, in pixel space, made as needed without end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.demo import models, motion, shapes
from edit_compile.distillation.data.captioned_images import Share
from edit_compile.distillation.data.registry import DataConfig, register_data
from edit_compile.distillation.data.source import Batch, BatchRequest, DataSource, SourceContext
from edit_compile.errors import DistillError

Draw = Callable[[random.Random], tuple[np.ndarray, str]]  # an image (H, W, 3), or a video (T, H, W, 3), in [0, 1], and its caption


@register_data("shapes")
class ShapesData(DataConfig):
    """The images of the demo models."""

    kind: Literal["shapes"] = "shapes"
    caption_dropout: Share = 0.1
    """The share of samples trained with the empty caption, which guidance needs."""

    def open(self, context: SourceContext) -> DataSource:
        """Open the source."""
        if models.draws_video(context.model):
            raise DistillError(f"data.kind: {self.kind} is images, and {type(context.model).__name__} makes videos; use moving-shapes")
        return ShapesSource(_draw_image, self.caption_dropout, context.model, context.seed)


@register_data("moving-shapes")
class MovingShapesData(DataConfig):
    """The videos of the demo video model: 8 frames."""

    kind: Literal["moving-shapes"] = "moving-shapes"
    caption_dropout: Share = 0.1
    """The share of samples trained with the empty caption, which guidance needs."""

    def open(self, context: SourceContext) -> DataSource:
        """Open the source."""
        if not models.draws_video(context.model):
            raise DistillError(f"data.kind: {self.kind} is videos, and {type(context.model).__name__} makes images; use shapes")
        return ShapesSource(_draw_video, self.caption_dropout, context.model, context.seed)


@dataclass
class ShapesSource:
    """Makes every sample with a generator seeded by its position."""

    draw: Draw
    caption_dropout: float
    model: nn.Module
    seed: int
    skipped: dict[str, str] = field(default_factory=dict)
    concurrent: bool = True

    def check(self, height: int, width: int, frames: int | None = None) -> None:
        """Accept any resolution, but no other number of frames."""
        if frames not in (None, motion.FRAMES):
            raise DistillError(f"moving shapes are videos of {motion.FRAMES} frames, not {frames}: leave frames out")

    def batch(self, request: BatchRequest) -> Batch:
        drawn, captions = zip(*(self._sample(request.split, position) for position in request.positions), strict=True)
        pixels = torch.from_numpy(np.stack(drawn)).movedim(-1, 1) * 2 - 1
        return Batch(_resized(pixels, request.height, request.width), models.conditions(self.model, captions), captions)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)

    def _sample(self, split: str, position: int) -> tuple[np.ndarray, str]:
        rng = random.Random(f"{self.seed}/{split}/{position}")
        pixels, caption = self.draw(rng)
        return pixels, "" if rng.random() < self.caption_dropout else caption


def _draw_image(rng: random.Random) -> tuple[np.ndarray, str]:
    scene = shapes.random_scene(rng)
    return shapes.render(scene), shapes.caption(scene)


def _draw_video(rng: random.Random) -> tuple[np.ndarray, str]:
    clip = motion.random_clip(rng)
    return motion.render(clip), motion.caption(clip)


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale images (B, 3, H, W), or the frames of videos (B, 3, T, H, W)."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    single = pixels.reshape(-1, 1, *pixels.shape[-2:])
    scaled = F.interpolate(single, (height, width), mode="bilinear", antialias=True)
    return scaled.reshape(*pixels.shape[:-2], height, width)
