"""Coloured shapes with captions: the procedural data set the demo models are trained on.

A scene is a plain background with one or two objects, each with a size, a colour, a shape and a quadrant.
`render` draws it, `caption` describes it, and `check` reads an image back, so that a program, not the eye,
decides whether a model draws what the caption says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

IMAGE_SIZE = 32

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 40),
    "purple": (160, 50, 190),
    "cyan": (50, 210, 220),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (12, 12, 12), "gray": (128, 128, 128), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 4.5, "large": 6.5}
PLACES = {("upper", "left"): (8, 8), ("upper", "right"): (8, 24), ("lower", "left"): (24, 8), ("lower", "right"): (24, 24)}
_SUPERSAMPLING = 4
_JITTER = 1.0
TWO_OBJECTS_SHARE = 1 / 3


@dataclass(frozen=True)
class Item:
    """One object. `offset` is its centre's (row, column) displacement from the quadrant's centre, in pixels."""

    size: str
    colour: str
    shape: str
    place: tuple[str, str]
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    background: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class ItemCheck:
    """What `check` found in one object's quadrant."""

    colour_and_place: bool
    shape: bool


def random_scene(rng: random.Random) -> Scene:
    """Choose a scene uniformly; a third of the scenes have two objects, in different quadrants."""
    count = 2 if rng.random() < TWO_OBJECTS_SHARE else 1
    places = rng.sample(sorted(PLACES), count)
    items = tuple(
        Item(
            size=rng.choice(sorted(SIZES)),
            colour=rng.choice(sorted(COLOURS)),
            shape=rng.choice(SHAPES),
            place=place,
            offset=(rng.uniform(-_JITTER, _JITTER), rng.uniform(-_JITTER, _JITTER)),
        )
        for place in places
    )
    return Scene(rng.choice(sorted(BACKGROUNDS)), items)


def caption(scene: Scene) -> str:
    """Describe a scene, in 22 words for one object and 29 for two."""
    described = " and ".join(f"a {i.size} {i.colour} {i.shape} in the {i.place[0]} {i.place[1]} part" for i in scene.items)
    ending = "of the picture" if len(scene.items) == 2 else "of the picture and nothing else"
    return f"a picture with a {scene.background} background showing {described} {ending}"


def render(scene: Scene) -> np.ndarray:
    """Draw a scene as (32, 32, 3) float32 in [0, 1], antialiased."""
    image = np.broadcast_to(np.asarray(BACKGROUNDS[scene.background], np.float32) / 255, (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for item in scene.items:
        row, column = PLACES[item.place]
        cover = coverage(item.shape, SIZES[item.size], row + item.offset[0], column + item.offset[1])[..., None]
        image += cover * (np.asarray(COLOURS[item.colour], np.float32) / 255 - image)
    return image


def scenes(seed: int) -> Iterator[Scene]:
    """Yield an endless, reproducible stream of scenes."""
    rng = random.Random(seed)
    while True:
        yield random_scene(rng)


def check(image: np.ndarray, scene: Scene) -> list[ItemCheck]:
    """Check each object of a scene in an image, (32, 32, 3) in [0, 1].

    A pixel votes for the nearest palette colour. Colour and place are right when the object's colour fills
    at least half of the described object's area in its quadrant and is that quadrant's most frequent
    object colour. The shape is right when, among templates of every shape and size around the quadrant's
    centre, the one that overlaps that colour's pixels best (intersection over union) is of the right shape.
    """
    names = [*COLOURS, *BACKGROUNDS]
    votes = palette_votes(image)
    results = []
    for item in scene.items:
        rows, columns = _quadrant(item.place)
        quadrant = votes[rows, columns]
        counts = np.bincount(quadrant.ravel(), minlength=len(names))[: len(COLOURS)]
        index = names.index(item.colour)
        area = coverage(item.shape, SIZES[item.size], *PLACES[item.place]).sum()
        placed = bool(counts.argmax() == index and counts[index] >= area / 2)
        results.append(ItemCheck(placed, placed and _best_shape(quadrant == index) == item.shape))
    return results


def palette_votes(image: np.ndarray) -> np.ndarray:
    """Find each pixel's nearest palette colour in an image (H, W, 3): (H, W) of indices into the colours, then the backgrounds."""
    palette = np.asarray([*COLOURS.values(), *BACKGROUNDS.values()], np.float32) / 255
    votes: np.ndarray = ((image[:, :, None, :] - palette) ** 2).sum(-1).argmin(-1)
    return votes


def _quadrant(place: tuple[str, str]) -> tuple[slice, slice]:
    half = IMAGE_SIZE // 2
    first, second = slice(0, half), slice(half, None)
    return (first if place[0] == "upper" else second, first if place[1] == "left" else second)


def _best_shape(mask: np.ndarray) -> str:
    shapes, templates = _templates()
    intersection = (templates & mask).sum((1, 2))
    union = (templates | mask).sum((1, 2))
    return shapes[int((intersection / union).argmax())]


@cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Draw every shape and size at offsets of half pixels: names, and masks (N, 16, 16) of the upper left quadrant."""
    steps = np.arange(-2.0, 2.5, 0.5)
    shapes, masks = [], []
    for shape in SHAPES:
        for radius in SIZES.values():
            for down in steps:
                for right in steps:
                    shapes.append(shape)
                    masks.append(coverage(shape, radius, 8 + down, 8 + right)[: IMAGE_SIZE // 2, : IMAGE_SIZE // 2] > 0.5)
    return shapes, np.stack(masks)


def coverage(shape: str, radius: float, row: float, column: float, side: int = IMAGE_SIZE) -> np.ndarray:
    """Compute how much of each pixel a shape covers, (side, side) float32 in [0, 1]."""
    axis = (np.arange(side * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    y, x = axis[:, None] - row, axis[None, :] - column
    if shape == "circle":
        inside = x**2 + y**2 <= radius**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= radius * 0.88
    elif shape == "triangle":
        inside = (y <= radius * 0.85) & (abs(x) <= (y + radius) * 0.55)
    else:
        inside = (np.minimum(abs(x), abs(y)) <= radius * 0.3) & (np.maximum(abs(x), abs(y)) <= radius)
    s = _SUPERSAMPLING
    cover: np.ndarray = inside.reshape(side, s, side, s).mean((1, 3), dtype=np.float32)
    return cover
