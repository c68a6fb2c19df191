"""Moving shapes with captions: the procedural data set the demo video model is trained on.

A clip shows one object of a colour and a shape that moves straight, at one of two speeds, over a plain background.
`render` draws it, `caption` describes it, and `check` reads a clip back, so that a program, not the eye, decides
whether a model draws what the caption says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from edit_compile.demo import shapes

FRAMES, SIDE = 8, 24
RADIUS = 4.5  # pixels
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
SPEEDS = {"slowly": 0.75, "quickly": 1.5}  # pixels a frame
_STILL = 0.4  # pixels a frame: what is slower does not move
_JITTER = 1.5  # pixels that the middle of the way is off the image's, in rows and in columns


@dataclass(frozen=True)
class Clip:
    """One moving object. `start` is its centre in the first frame, (row, column) in pixels."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str
    start: tuple[float, float]


@dataclass(frozen=True)
class ClipCheck:
    """What `check` found to be as described; shape and motion count only together with the colour."""

    colour: bool
    shape: bool
    motion: bool


def random_clip(rng: random.Random) -> Clip:
    """Choose a clip uniformly; its object is near the image's centre when half of the clip is over, and stays inside."""
    direction, speed = rng.choice(sorted(DIRECTIONS)), rng.choice(sorted(SPEEDS))
    travel = [(FRAMES - 1) * SPEEDS[speed] * along for along in DIRECTIONS[direction]]
    row, column = (SIDE / 2 + rng.uniform(-_JITTER, _JITTER) - way / 2 for way in travel)
    colour, shape, background = rng.choice(sorted(shapes.COLOURS)), rng.choice(shapes.SHAPES), rng.choice(sorted(shapes.BACKGROUNDS))
    return Clip(colour, shape, direction, speed, background, (row, column))


def clips(seed: int) -> Iterator[Clip]:
    """Yield an endless, reproducible stream of clips."""
    rng = random.Random(seed)
    while True:
        yield random_clip(rng)


def caption(clip: Clip) -> str:
    """Describe a clip, in 10 words."""
    return f"a {clip.colour} {clip.shape} moves {clip.direction} {clip.speed} on a {clip.background} background"


def render(clip: Clip) -> np.ndarray:
    """Draw a clip as (8, 24, 24, 3) float32 in [0, 1], antialiased."""
    background = np.asarray(shapes.BACKGROUNDS[clip.background], np.float32) / 255
    colour = np.asarray(shapes.COLOURS[clip.colour], np.float32) / 255
    cover = np.stack([shapes.coverage(clip.shape, RADIUS, *centre, SIDE) for centre in centres(clip)])
    drawn: np.ndarray = background + cover[..., None] * (colour - background)
    return drawn


def centres(clip: Clip) -> list[tuple[float, float]]:
    """Return the object's centre in each frame, (row, column) in pixels."""
    down, right = (SPEEDS[clip.speed] * along for along in DIRECTIONS[clip.direction])
    return [(clip.start[0] + frame * down, clip.start[1] + frame * right) for frame in range(FRAMES)]


def check(video: np.ndarray, clip: Clip) -> ClipCheck:
    """Check whether a video, (frames, 24, 24, 3) in [0, 1], shows what a clip's caption says.

    A pixel votes for the nearest palette colour. The colour is right when in every frame but one it is the most frequent
    object colour and fills at least half of the described object's area. The motion is right when the straight line through
    the centres of that colour's pixels runs in the described direction at nearer the described speed than the other. The
    shape is right when, over all frames, templates of the right shape overlap those pixels best (intersection over union).
    """
    masks = [_object_pixels(frame, clip) for frame in video]
    seen = [mask for mask in masks if mask is not None]
    if len(seen) < len(masks) - 1:
        return ClipCheck(colour=False, shape=False, motion=False)
    times = [time for time, mask in enumerate(masks) if mask is not None]
    return ClipCheck(colour=True, shape=_best_shape(seen) == clip.shape, motion=_motion(times, seen) == (clip.direction, clip.speed))


def _object_pixels(frame: np.ndarray, clip: Clip) -> np.ndarray | None:
    """Find the pixels of the described object's colour, (24, 24) of bool; None if another colour prevails or they are too few."""
    votes = shapes.palette_votes(frame)
    counts = np.bincount(votes.ravel(), minlength=len(shapes.COLOURS))[: len(shapes.COLOURS)]
    index = list(shapes.COLOURS).index(clip.colour)
    enough = shapes.coverage(clip.shape, RADIUS, SIDE / 2, SIDE / 2, SIDE).sum() / 2
    return votes == index if counts.argmax() == index and counts[index] >= enough else None


def _motion(times: list[int], masks: list[np.ndarray]) -> tuple[str, str] | None:
    """Name the direction and speed of the line fitted to the masks' centres over time; None if they hardly move."""
    slopes = np.polyfit(times, np.stack([_centre(mask) for mask in masks]), 1)[0]
    along = {name: float(np.dot(slopes, way)) for name, way in DIRECTIONS.items()}
    direction = max(along, key=lambda name: along[name])
    speed = min(SPEEDS, key=lambda name: abs(SPEEDS[name] - along[direction]))
    return (direction, speed) if along[direction] >= _STILL else None


def _centre(mask: np.ndarray) -> np.ndarray:
    """Return the mean (row, column) of a mask's pixels."""
    centre: np.ndarray = np.argwhere(mask).mean(0)
    return centre


def _best_shape(masks: list[np.ndarray]) -> str:
    """Name the shape whose templates, each frame's best, overlap the masks best on average."""
    names, templates = _templates()
    overlaps = []
    for mask in masks:
        centred = np.roll(mask, tuple(SIDE // 2 - np.round(_centre(mask)).astype(int)), (0, 1))
        overlaps.append((templates & centred).sum((1, 2)) / (templates | centred).sum((1, 2)))
    mean = {name: np.mean([max(row[[i for i, n in enumerate(names) if n == name]]) for row in overlaps]) for name in shapes.SHAPES}
    return max(mean, key=lambda name: mean[name])


@cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Draw every shape around the image's centre, at offsets of half pixels: names, and masks (N, 24, 24)."""
    steps = SIDE / 2 + np.arange(-2.0, 2.5, 0.5)
    drawn = [
        (shape, shapes.coverage(shape, RADIUS, down, right, SIDE) > 0.5) for shape in shapes.SHAPES for down in steps for right in steps
    ]
    return [name for name, _ in drawn], np.stack([mask for _, mask in drawn])
