"""Prompt adherence: how many described objects a demo model draws as its captions say, on held-out captions."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import torch
from torch import nn

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
    checks: list[shapes.ItemCheck] = []
    for start in range(0, prompts, _BATCH):
        part = scenes[start : start + _BATCH]
        images = models.sample(model, [shapes.caption(scene) for scene in part], seed=start, steps=steps)
        for image, scene in zip(images, part, strict=True):
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
    checks: list[groups.GroupCheck] = []
    for start in range(0, prompts, _BATCH):
        part = scenes[start : start + _BATCH]
        images = models.sample(model, [groups.caption(scene) for scene in part], seed=start, steps=steps)
        for image, scene in zip(images, part, strict=True):
            checks += groups.check(image.permute(1, 2, 0).numpy(), scene)
    names = ("colour_and_place", "count", "size", "shape", "texture", "all")
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
    checks: list[motion.ClipCheck] = []
    for start in range(0, prompts, _BATCH):
        part = clips[start : start + _BATCH]
        videos = models.sample(model, [motion.caption(clip) for clip in part], seed=start, steps=steps)
        checks += [motion.check(video.permute(1, 2, 3, 0).numpy(), clip) for video, clip in zip(videos, part, strict=True)]
    shares = {
        "colour": [found.colour for found in checks],
        "shape": [found.shape for found in checks],
        "motion": [found.motion for found in checks],
        "all": [found.shape and found.motion for found in checks],
    }
    return MotionAdherence(len(checks), **{name: sum(right) / len(checks) for name, right in shares.items()})
