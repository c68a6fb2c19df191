"""Groups of textured shapes with long captions: the procedural data set the 64 px demo models are trained on.

A scene is a plain background with two or three groups in different quadrants. A group is one to three equal objects of a size,
a texture, a colour and a shape. Its caption tells the quadrant, not where in it the objects are, so that the tokens of an image
must agree on that among themselves. `render` draws a scene, `caption` describes it, and `check` reads an image back, so that a
program, not the eye, decides whether a model draws what the caption says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from edit_compile.demo import shapes

IMAGE_SIZE = 64  # what lengths in pixels are for
COUNTS = {"one": 1, "two": 2, "three": 3}
SIZES = {"small": 4.25, "large": 6.5}  # the radius, in pixels
TEXTURES = ("plain", "striped", "checkered")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
THREE_GROUPS_SHARE = 1 / 2
_QUADRANT, _CELL, _PERIOD = IMAGE_SIZE // 2, IMAGE_SIZE // 4, IMAGE_SIZE // 16  # pixels; four cells a quadrant, one object in each at most
_SHADE = 0.45  # of a texture's dark half, as a share of the colour
JITTER = 0.75  # pixels that an object is off the middle of its cell
_LEAST_AREA = 1 / 3  # of the smallest object's area, for what counts as an object
_LEAST_OTHER, _MOST_SPECKS = 1 / 2, 1 / 2  # of that area, for an object of another colour; of a group's area, for pixels of others

Position = tuple[float, float]  # (row, column) in pixels


@dataclass(frozen=True)
class Group:
    """Equal objects in one quadrant. `centres` are theirs, in the image."""

    size: str
    texture: str
    colour: str
    shape: str
    place: tuple[str, str]
    centres: tuple[Position, ...]


@dataclass(frozen=True)
class Scene:
    background: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class GroupCheck:
    """What `check` found of one group to be as described; all but the first count only together with it."""

    colour_and_place: bool
    count: bool = False
    size: bool = False
    shape: bool = False
    texture: bool = False
    background: bool = False
    nothing_else: bool = False

    @property
    def all(self) -> bool:
        """Say whether everything is."""
        drawn = self.colour_and_place and self.count and self.size and self.shape and self.texture
        return drawn and self.background and self.nothing_else


def random_scene(rng: random.Random) -> Scene:
    """Choose a scene uniformly; half of the scenes have two groups, half of them three."""
    count = 3 if rng.random() < THREE_GROUPS_SHARE else 2
    places = rng.sample(sorted(shapes.PLACES), count)
    return Scene(rng.choice(sorted(shapes.BACKGROUNDS)), tuple(_random_group(rng, place) for place in places))


def _random_group(rng: random.Random, place: tuple[str, str]) -> Group:
    top, left = (_QUADRANT * (side in ("lower", "right")) for side in place)
    cells = rng.sample([(row, column) for row in (0, 1) for column in (0, 1)], rng.choice(sorted(COUNTS.values())))
    middles = [(top + (row + 0.5) * _CELL, left + (column + 0.5) * _CELL) for row, column in cells]
    return Group(
        size=rng.choice(sorted(SIZES)),
        texture=rng.choice(TEXTURES),
        colour=rng.choice(sorted(shapes.COLOURS)),
        shape=rng.choice(shapes.SHAPES),
        place=place,
        centres=tuple((row + rng.uniform(-JITTER, JITTER), column + rng.uniform(-JITTER, JITTER)) for row, column in middles),
    )


def scenes(seed: int) -> Iterator[Scene]:
    """Yield an endless, reproducible stream of scenes."""
    rng = random.Random(seed)
    while True:
        yield random_scene(rng)


def caption(scene: Scene) -> str:
    """Describe a scene, in 28 words for two groups and 39 for three."""
    described = " and ".join(_described(group) for group in scene.groups)
    return f"a picture with a {scene.background} background showing {described}"


def _described(group: Group) -> str:
    word = next(word for word, count in COUNTS.items() if count == len(group.centres))
    noun = group.shape if word == "one" else PLURALS[group.shape]
    return f"{word} {group.size} {group.texture} {group.colour} {noun} in the {group.place[0]} {group.place[1]} part"


def render(scene: Scene, side: int = IMAGE_SIZE) -> np.ndarray:
    """Draw a scene as (side, side, 3) float32 in [0, 1], antialiased; lengths and textures scale with the side."""
    background = np.asarray(shapes.BACKGROUNDS[scene.background], np.float32) / 255
    image = np.broadcast_to(background, (side, side, 3)).copy()
    scale = side / IMAGE_SIZE
    for group in scene.groups:
        texture = _texture(group.texture, side)[..., None]
        paint = np.asarray(shapes.COLOURS[group.colour], np.float32) / 255 * (1 - (1 - _SHADE) * texture)
        for row, column in group.centres:
            _paint(image, paint, group.shape, SIZES[group.size] * scale, (row * scale, column * scale))
    return image


def _paint(image: np.ndarray, paint: np.ndarray, shape: str, radius: float, centre: Position) -> None:
    """Draw one object, in the window around it."""
    reach = int(radius) + 2
    top, left = (max(int(place) - reach, 0) for place in centre)
    window = np.s_[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
    cover = shapes.coverage(shape, radius, centre[0] - top, centre[1] - left, 2 * reach + 1)
    rows, columns = image[window].shape[:2]
    image[window] += cover[:rows, :columns, None] * (paint[window] - image[window])


@cache
def _texture(name: str, side: int) -> np.ndarray:
    """Make the share of dark in each pixel, (side, side): halves of a period as long as a sixteenth of the image."""
    half = _PERIOD // 2 * side / IMAGE_SIZE
    bands = np.floor((np.arange(side) + 0.5) / half) % 2
    if name == "striped":
        return np.broadcast_to(bands[:, None], (side, side)).astype(np.float32)
    if name == "checkered":
        dark: np.ndarray = (bands[:, None] != bands).astype(np.float32)
        return dark
    return np.zeros((side, side), np.float32)


def check(image: np.ndarray, scene: Scene) -> list[GroupCheck]:
    """Check each group of a scene in an image, (64, 64, 3) in [0, 1].

    A pixel votes for the nearest of the colours, their dark shades and the backgrounds. Colour and place are right when the
    group's colour, with its shade, is its quadrant's most frequent and fills at least half of the described area. The count is
    that of connected regions of this colour that are not too small. Size and shape are right when most of these regions are best
    overlapped (intersection over union) by templates of that size and shape, and the texture when its pattern, anyhow shifted,
    agrees best with where the dark pixels are. The background is right when the described one is the quadrant's most frequent. There is
    nothing else when there is neither an object nor many pixels of other colours, and quadrants without a group have no object.

    Of 876 groups in true images 98.3% are right in everything; most of the others are small objects whose shape is taken for another.
    """
    votes = _votes(image)
    rest = [votes.at(place) for place in shapes.PLACES if place not in {group.place for group in scene.groups}]
    empty = not any(_has_object(part.coloured) for part in rest)
    return [_check_group(votes.at(group.place), group, scene.background, empty) for group in scene.groups]


def _check_group(votes: _Votes, group: Group, background: str, empty: bool) -> GroupCheck:
    names = list(shapes.COLOURS)
    counts = np.bincount(votes.colours.ravel(), minlength=len(names) + 1)[: len(names)]
    area = _area(group.shape, group.size) * len(group.centres)
    if counts.argmax() != names.index(group.colour) or counts.max() < area / 2:
        return GroupCheck(colour_and_place=False)
    mask = votes.colours == names.index(group.colour)
    regions = [region for region in _regions(mask) if region.sum() >= _LEAST_AREA * _smallest_area()]
    other = votes.coloured & ~mask
    seen = [_best_template(region) for region in regions]
    return GroupCheck(
        colour_and_place=True,
        count=len(regions) == len(group.centres),
        size=_most(size == group.size for _, size in seen),
        shape=_most(shape == group.shape for shape, _ in seen),
        texture=_best_texture(mask, votes.dark) == group.texture,
        background=votes.background == background,
        nothing_else=empty and other.sum() <= _MOST_SPECKS * area and not _has_object(other),
    )


def _has_object(mask: np.ndarray) -> bool:
    return any(region.sum() >= _LEAST_OTHER * _smallest_area() for region in _regions(mask))


def _most(right: Iterator[bool]) -> bool:
    votes = list(right)
    return sum(votes) > len(votes) / 2


class _Votes(NamedTuple):
    """What each pixel shows, (h, w) each: its colour, an index, or their number for a background; whether it is of the dark shade;
    and which background, an index, or less than 0 for none."""

    colours: np.ndarray
    dark: np.ndarray
    backgrounds: np.ndarray

    @property
    def coloured(self) -> np.ndarray:
        """Say where no background is."""
        none: np.ndarray = self.backgrounds < 0
        return none

    @property
    def background(self) -> str:
        """Return the most frequent background."""
        return list(shapes.BACKGROUNDS)[np.bincount(self.backgrounds[~self.coloured], minlength=1).argmax()]

    def at(self, place: tuple[str, str]) -> _Votes:
        """Return those of a quadrant."""
        rows, columns = (slice(_QUADRANT, None) if side in ("lower", "right") else slice(_QUADRANT) for side in place)
        return _Votes(*(each[rows, columns] for each in self))


def _votes(image: np.ndarray) -> _Votes:
    bright = np.asarray(list(shapes.COLOURS.values()), np.float32) / 255
    backgrounds = np.asarray(list(shapes.BACKGROUNDS.values()), np.float32) / 255
    palette = np.concatenate([bright, bright * _SHADE, backgrounds])
    votes = ((image[:, :, None, :] - palette) ** 2).sum(-1).argmin(-1)
    number = len(bright)
    return _Votes(np.where(votes < 2 * number, votes % number, number), (votes >= number) & (votes < 2 * number), votes - 2 * number)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into its regions of pixels that touch at edges."""
    rest, found = mask.copy(), []
    while rest.any():
        region = np.zeros_like(mask)
        region.ravel()[rest.argmax()] = True
        while True:
            grown = region.copy()
            grown[1:] |= region[:-1]
            grown[:-1] |= region[1:]
            grown[:, 1:] |= region[:, :-1]
            grown[:, :-1] |= region[:, 1:]
            grown &= rest
            if grown.sum() == region.sum():
                break
            region = grown
        found.append(region)
        rest &= ~region
    return found


def _best_template(region: np.ndarray) -> tuple[str, str]:
    """Name the shape and size whose template overlaps a region best."""
    names, templates = _templates()
    window, middle = templates.shape[-1], templates.shape[-1] // 2
    places = np.argwhere(region)
    low, high = places.min(0), places.max(0)
    shift = middle - (low + high + 1) // 2
    placed = np.zeros((window, window), bool)
    at = places + shift
    inside = ((at >= 0) & (at < window)).all(1)
    placed[tuple(at[inside].T)] = True
    overlap = (templates & placed).sum((1, 2)) / (templates | placed).sum((1, 2))
    return names[int(overlap.argmax())]


@cache
def _templates() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Draw every shape and size at offsets of quarter pixels around a window's middle: names, and masks (N, 20, 20).

    On a black background a pixel that an object covers by a quarter can pass for its dark shade, on others by half.
    """
    window = _CELL + 4
    offsets = window // 2 + np.arange(-1.0, 1.25, 0.25)
    drawn = [
        ((shape, size), shapes.coverage(shape, radius, down, right, window) > least)
        for shape in shapes.SHAPES
        for size, radius in SIZES.items()
        for least in (0.25, 0.5)
        for down in offsets
        for right in offsets
    ]
    return [name for name, _ in drawn], np.stack([mask for _, mask in drawn])


@cache
def _smallest_area() -> float:
    return min(_area(shape, size) for shape in shapes.SHAPES for size in SIZES)


@cache
def _area(shape: str, size: str) -> float:
    return float(shapes.coverage(shape, SIZES[size], _CELL / 2, _CELL / 2, _CELL).sum())


def _best_texture(mask: np.ndarray, dark: np.ndarray) -> str:
    """Name the texture that agrees best with where a mask's pixels are dark, anyhow shifted."""
    seen = dark[mask]
    agreement = {"plain": float(1 - seen.mean())}
    for name in TEXTURES[1:]:
        pattern = _texture(name, IMAGE_SIZE)
        shifted = (pattern[y : y + _QUADRANT, x : x + _QUADRANT][mask] for y in range(_PERIOD) for x in range(_PERIOD))
        agreement[name] = max(float((seen == one).mean()) for one in shifted)
    return max(agreement, key=lambda name: agreement[name])
