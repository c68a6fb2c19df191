"""Prompt adherence: how many described objects a demo model draws as its captions say, on held-out captions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edit_compile.demo import groups, models, motion, shapes

HELD_OUT_SEED = 10_000  # of captions; training draws its scenes from other seeds
_BATCH = 50


@dataclass(frozen=True)
class PromptAdherence:
    """Shares in [0, 1] of `objects` described objects: with the right colour and position, and with the right shape as well."""

    objects: int
    colour_and_place: float
    shape: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


def held_out_scenes(count: int, seed: int = HELD_OUT_SEED) -> list[shapes.Scene]:
    """Return the first scenes of a reproducible stream that is never trained on."""
    return list(itertools.islice(shapes.scenes(seed), count))


def prompt_adherence(model: nn.Module, prompts: int = 200, *, seed: int = HELD_OUT_SEED, steps: int = 25) -> PromptAdherence:
    """Sample images of 32 x 32 px for the captions of `prompts` held-out scenes, and check every object described."""
    scenes = held_out_scenes(prompts, seed)
    return _check_shapes(scenes, draw(model, [shapes.caption(scene) for scene in scenes], steps))


def _check_shapes(scenes: Sequence[shapes.Scene], images: Tensor) -> PromptAdherence:
    checks: list[shapes.ItemCheck] = []
    for image, scene in zip(images, scenes, strict=True):
        checks += shapes.check(image.permute(1, 2, 0).numpy(), scene)
    placed = torch.tensor([check.colour_and_place for check in checks], dtype=torch.float64)
    shaped = torch.tensor([check.shape for check in checks], dtype=torch.float64)
    return PromptAdherence(len(checks), placed.mean().item(), shaped.mean().item())


@dataclass(frozen=True)
class GroupAdherence:
    """Shares in [0, 1] of `groups` described groups: with the right colour and position; with one more property right as well; with all."""

    groups: int
    colour_and_place: float
    count: float
    size: float
    shape: float
    texture: float
    background: float
    nothing_else: float
    all: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


def held_out_groups(count: int, seed: int = HELD_OUT_SEED) -> list[groups.Scene]:
    """Return the first scenes of groups of a reproducible stream that is never trained on."""
    return list(itertools.islice(groups.scenes(seed), count))


def group_adherence(model: nn.Module, prompts: int = 200, *, seed: int = HELD_OUT_SEED, steps: int = 25) -> GroupAdherence:
    """Sample images of 64 x 64 px for the captions of `prompts` held-out scenes of groups, and check every group described."""
    scenes = held_out_groups(prompts, seed)
    return _check_groups(scenes, draw(model, [groups.caption(scene) for scene in scenes], steps))


def _check_groups(scenes: Sequence[groups.Scene], images: Tensor) -> GroupAdherence:
    checks: list[groups.GroupCheck] = []
    for image, scene in zip(images, scenes, strict=True):
        checks += groups.check(image.permute(1, 2, 0).numpy(), scene)
    names = ("colour_and_place", "count", "size", "shape", "texture", "background", "nothing_else", "all")
    return GroupAdherence(len(checks), **{name: sum(getattr(check, name) for check in checks) / len(checks) for name in names})


@dataclass(frozen=True)
class MotionAdherence:
    """Shares in [0, 1] of `clips` described clips whose object has the right colour; the right shape and motion as well; and all three."""

    clips: int
    colour: float
    shape: float
    motion: float
    all: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


def held_out_clips(count: int, seed: int = HELD_OUT_SEED) -> list[motion.Clip]:
    """Return the first clips of a reproducible stream that is never trained on."""
    return list(itertools.islice(motion.clips(seed), count))


def motion_adherence(model: nn.Module, prompts: int = 200, *, seed: int = HELD_OUT_SEED, steps: int = 25) -> MotionAdherence:
    """Sample clips of 8 frames of 24 x 24 px for the captions of `prompts` held-out clips, and check each."""
    clips = held_out_clips(prompts, seed)
    return _check_clips(clips, draw(model, [motion.caption(clip) for clip in clips], steps))


def _check_clips(clips: Sequence[motion.Clip], videos: Tensor) -> MotionAdherence:
    checks = [motion.check(video.permute(1, 2, 3, 0).numpy(), clip) for video, clip in zip(videos, clips, strict=True)]
    shares = {
        "colour": [found.colour for found in checks],
        "shape": [found.shape for found in checks],
        "motion": [found.motion for found in checks],
        "all": [found.shape and found.motion for found in checks],
    }
    return MotionAdherence(len(checks), **{name: sum(right) / len(checks) for name, right in shares.items()})


def draw(model: nn.Module, captions: Sequence[str], steps: int) -> Tensor:
    """Sample the captions' images or videos in batches, always from the same noise: (B, 3, ...) in [0, 1]."""
    parts = range(0, len(captions), _BATCH)
    return torch.cat([models.sample(model, captions[start : start + _BATCH], seed=start, steps=steps) for start in parts])


Adherence = PromptAdherence | GroupAdherence | MotionAdherence


@dataclass(frozen=True)
class HeldOut:
    """What a demo model is asked to draw.

    Attributes:
        check: tells how well samples (B, 3, ...) of all captions obey.
        true_samples: renders what the captions describe, (B, 3, ...) in [0, 1].
    """

    captions: tuple[str, ...]
    check: Callable[[Tensor], Adherence]
    true_samples: Callable[[], Tensor]


def held_out(data: models.TrainingData, prompts: int) -> HeldOut:
    """Return the first held-out captions of what a demo model was trained on, with what they stand for."""
    if data == models.GROUPS:
        scenes = held_out_groups(prompts)
        return HeldOut(tuple(map(groups.caption, scenes)), partial(_check_groups, scenes), partial(_rendered, groups.render, scenes))
    if data == models.CLIPS:
        clips = held_out_clips(prompts)
        return HeldOut(tuple(map(motion.caption, clips)), partial(_check_clips, clips), partial(_rendered, motion.render, clips))
    simple = held_out_scenes(prompts)
    return HeldOut(tuple(map(shapes.caption, simple)), partial(_check_shapes, simple), partial(_rendered, shapes.render, simple))


def _rendered(render: Callable[[Any], np.ndarray], scenes: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).movedim(-1, 1)
