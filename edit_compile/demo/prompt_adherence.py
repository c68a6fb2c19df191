"""Caption obedience: the shares of described objects that a demo model draws as its captions say, on held-out captions."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import torch
from torch import nn

from edit_compile.demo import models, shapes

HELD_OUT_SEED = 10_000  # of captions; training draws its scenes from other seeds
_BATCH = 50


@dataclass(frozen=True)
class Obedience:
    """Shares in [0, 1] of `objects` described objects: colour and place right, and shape right as well."""

    objects: int
    colour_and_place: float
    shape: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def held_out_scenes(count: int, seed: int = HELD_OUT_SEED) -> list[shapes.Scene]:
    """The first scenes of a reproducible stream that no training uses."""
    return list(itertools.islice(shapes.scenes(seed), count))


def obedience(model: nn.Module, prompts: int = 200, *, seed: int = HELD_OUT_SEED, steps: int = 25) -> Obedience:
    """Draw the captions of `prompts` held-out scenes, 32 x 32 px, and read every described object back."""
    scenes = held_out_scenes(prompts, seed)
    found = []
    for start in range(0, prompts, _BATCH):
        part = scenes[start : start + _BATCH]
        pictures = models.sample(model, [shapes.caption(scene) for scene in part], seed=start, steps=steps)
        for picture, scene in zip(pictures, part, strict=True):
            found += shapes.check(picture.permute(1, 2, 0).numpy(), scene)
    placed = torch.tensor([check.colour_and_place for check in found], dtype=torch.float64)
    shaped = torch.tensor([check.shape for check in found], dtype=torch.float64)
    return Obedience(len(found), placed.mean().item(), shaped.mean().item())
