"""Data of kind `shapes`: the demo's coloured shapes with captions, in pixel space, made as needed without end."""

from __future__ import annotations

import random
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.demo import models, shapes
from edit_compile.distillation.data.captioned_images import Share
from edit_compile.distillation.data.registry import DataConfig, register_data
from edit_compile.distillation.data.source import Batch, BatchRequest, DataSource, SourceContext


@register_data("shapes")
class ShapesData(DataConfig):
    """The demo's images."""

    kind: Literal["shapes"] = "shapes"
    caption_dropout: Share = 0.1
    """The share of samples trained with the empty caption, which guidance needs."""

    def open(self, context: SourceContext) -> DataSource:
        """Open the source."""
        return ShapesSource(self.caption_dropout, context.model, context.seed)


class ShapesSource:
    """Makes every sample with a generator seeded by its position."""

    concurrent = True

    def __init__(self, caption_dropout: float, model: nn.Module, seed: int) -> None:
        self.caption_dropout, self.model, self.seed = caption_dropout, model, seed
        self.skipped: dict[str, str] = {}

    def check(self, height: int, width: int) -> None:
        """Accept any resolution."""

    def batch(self, request: BatchRequest) -> Batch:
        scenes = [self._scene(request.split, position) for position in request.positions]
        images = torch.from_numpy(np.stack([shapes.render(scene) for scene, _ in scenes])).permute(0, 3, 1, 2) * 2 - 1
        captions = tuple(caption for _, caption in scenes)
        return Batch(_resized(images, request.height, request.width), models.conditions(self.model, captions), captions)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)

    def _scene(self, split: str, position: int) -> tuple[shapes.Scene, str]:
        rng = random.Random(f"{self.seed}/{split}/{position}")
        scene = shapes.random_scene(rng)
        return scene, "" if rng.random() < self.caption_dropout else shapes.caption(scene)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)
