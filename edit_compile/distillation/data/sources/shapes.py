"""Data of kinds `shapes`, `shape-groups` and `moving-shapes`: the demos' coloured shapes with captions, in pixel space, made as needed
without end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.adapters.denoise import misfit
from edit_compile.adapters.encoders import captioned_family
from edit_compile.demo import groups, models, motion, shapes
from edit_compile.distillation.data.captioned_images import Share
from edit_compile.distillation.data.registry import DataConfig, register_data
from edit_compile.distillation.data.source import Batch, BatchRequest, DataSource, SourceContext
from edit_compile.errors import DistillError

# To an image (H, W, 3), or a video (T, H, W, 3), in [0, 1], of about the given side in pixels if its kind can be, and its caption.
Draw = Callable[[random.Random, int], tuple[np.ndarray, str]]


class DrawnData(DataConfig):
    """Samples that are drawn for demo models."""

    caption_dropout: Share = 0.1
    """The share of samples trained with the empty caption, which guidance needs."""

    def check_model(self, model: nn.Module, base: str | None) -> None:
        """Accept demo models that were trained on this kind, and models that take the same."""
        captioned_family(model)
        _drawing_for(self.kind, model)

    def open(self, context: SourceContext) -> DataSource:
        """Open the source."""
        return ShapesSource(_drawing_for(self.kind, context.model), self.caption_dropout, context.model, context.seed)


@register_data("shapes")
class ShapesData(DrawnData):
    """The images of the 32 px demo models."""

    kind: Literal["shapes"] = "shapes"


@register_data("shape-groups")
class ShapeGroupsData(DrawnData):
    """The images of the 64 px demo models: groups of textured shapes, drawn at the stage's resolution."""

    kind: Literal["shape-groups"] = "shape-groups"


@register_data("moving-shapes")
class MovingShapesData(DrawnData):
    """The videos of the demo video model: 8 frames."""

    kind: Literal["moving-shapes"] = "moving-shapes"


def _drawing_for(kind: str, model: nn.Module) -> Draw:
    """Return how samples of a kind are drawn.

    Raises:
        DistillError: the model takes other latents or conditions, or was trained on another kind.
    """
    wanted, draw = _KINDS[models.trained_on(model)]
    frames = (motion.FRAMES,) if models.draws_video(model) else ()
    problem = misfit(model, torch.empty(1, 3, *frames, 8, 8, device="meta"), models.conditions(model, [""]))
    if problem is not None:
        raise DistillError(f"data.kind: {kind} is made for the demo models: {problem}; give the model's own data in data:")
    if kind != wanted:
        raise DistillError(f"data.kind: {kind} is not what this {type(model).__name__} was trained on; use {wanted}")
    return draw


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
        drawn, captions = zip(*(self._sample(request, position) for position in request.positions), strict=True)
        pixels = torch.from_numpy(np.stack(drawn)).movedim(-1, 1) * 2 - 1
        return Batch(_resized(pixels, request.height, request.width), models.conditions(self.model, captions), captions)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)

    def _sample(self, request: BatchRequest, position: int) -> tuple[np.ndarray, str]:
        rng = random.Random(f"{self.seed}/{request.split}/{position}")
        pixels, caption = self.draw(rng, max(request.height, request.width))
        return pixels, "" if request.empty_captions or rng.random() < self.caption_dropout else caption


def _draw_image(rng: random.Random, side: int) -> tuple[np.ndarray, str]:
    scene = shapes.random_scene(rng)
    return shapes.render(scene), shapes.caption(scene)


def _draw_groups(rng: random.Random, side: int) -> tuple[np.ndarray, str]:
    scene = groups.random_scene(rng)
    return groups.render(scene, side), groups.caption(scene)


def _draw_video(rng: random.Random, side: int) -> tuple[np.ndarray, str]:
    clip = motion.random_clip(rng)
    return motion.render(clip), motion.caption(clip)


_KINDS: dict[models.TrainingData, tuple[str, Draw]] = {
    models.SHAPES: ("shapes", _draw_image),
    models.GROUPS: ("shape-groups", _draw_groups),
    models.CLIPS: ("moving-shapes", _draw_video),
}


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale images (B, 3, H, W), or the frames of videos (B, 3, T, H, W)."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    single = pixels.reshape(-1, 1, *pixels.shape[-2:])
    scaled = F.interpolate(single, (height, width), mode="bilinear", antialias=True)
    return scaled.reshape(*pixels.shape[:-2], height, width)
