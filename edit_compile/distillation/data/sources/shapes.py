"""The demo's procedural data: coloured shapes with captions, in pixel space. It needs nothing and never ends."""

from __future__ import annotations

import random
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edit_compile.demo import models, shapes
from edit_compile.distillation.data.source import Batch, Request
from edit_compile.frozen import Frozen


class ShapesData(Frozen):
    """The demo's pictures.

    Attributes:
        caption_dropout: the share of samples whose caption is empty, which guidance needs.
    """

    kind: Literal["shapes"] = "shapes"
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1


class Shapes:
    """Every sample is drawn from a generator seeded by its position."""

    concurrent = True

    def __init__(self, data: ShapesData, model: nn.Module, seed: int) -> None:
        self.data, self.model, self.seed = data, model, seed
        self.skipped: dict[str, str] = {}

    def check(self, height: int, width: int) -> None:
        """Any can be drawn."""

    def batch(self, request: Request) -> Batch:
        drawn = [self._sample(request.split, position) for position in request.positions]
        pictures = torch.from_numpy(np.stack([shapes.render(scene) for scene, _ in drawn])).permute(0, 3, 1, 2) * 2 - 1
        captions = tuple(text for _, text in drawn)
        return Batch(_resized(pictures, request.height, request.width), models.conditions(self.model, captions), captions)

    def pixels(self, pictures: Tensor) -> Tensor:
        return (pictures / 2 + 0.5).clamp(0, 1)

    def _sample(self, split: str, position: int) -> tuple[shapes.Scene, str]:
        rng = random.Random(f"{self.seed}/{split}/{position}")
        scene = shapes.random_scene(rng)
        return scene, "" if rng.random() < self.data.caption_dropout else shapes.caption(scene)


def _resized(pictures: Tensor, height: int, width: int) -> Tensor:
    if pictures.shape[2:] == (height, width):
        return pictures
    return F.interpolate(pictures, (height, width), mode="bilinear", antialias=True)
