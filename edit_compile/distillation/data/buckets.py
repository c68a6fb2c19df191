"""Aspect-ratio buckets: shapes of about equal area, so that images keep most of what they show when a batch needs one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

from PIL import Image
from pydantic import Field, PositiveInt

from edit_compile.errors import DistillError
from edit_compile.frozen import Frozen

Shape = tuple[int, int]  # height, width
_STEPS_PER_SIDE = 16


class Buckets(Frozen):
    """The shapes of images at a stage's resolution."""

    max_ratio: Annotated[float, Field(ge=1, le=16)] = 2.0
    """Of the longer side to the shorter one."""
    multiple: PositiveInt | None = None
    """Sides are multiples of it. Default: about a sixteenth of the resolution's side (64 at 1024 pixels), so that the ratios are
    the same at every resolution, and a multiple of what the model can divide."""


@lru_cache
def bucket_shapes(height: int, width: int, granularity: int, buckets: Buckets | None) -> tuple[Shape, ...]:
    """List the shapes for a resolution, from flat to tall: the resolution itself, and shapes of at most its area.

    Args:
        granularity: sides must be multiples of it.
        buckets: None for the resolution alone.

    Raises:
        DistillError: the resolution or `multiple` does not fit the granularity.
    """
    if height % granularity or width % granularity:
        raise DistillError(f"stage resolution {height} x {width}: this model needs sides that are multiples of {granularity}")
    shapes = {(height, width)}
    if buckets is not None:
        step = buckets.multiple or _default_multiple(math.sqrt(height * width), granularity)
        if step % granularity:
            raise DistillError(f"data.buckets.multiple: {step}: this model needs a multiple of {granularity}")
        for h in range(step, int(math.sqrt(height * width * buckets.max_ratio)) + 1, step):
            w = height * width // h // step * step
            if w and max(h / w, w / h) <= buckets.max_ratio:
                shapes.add((h, w))
    return tuple(sorted(shapes, key=lambda shape: shape[0] / shape[1]))


def _default_multiple(side: float, granularity: int) -> int:
    return granularity * max(1, round(side / _STEPS_PER_SIDE / granularity))


def nearest_shape(size: Shape, shapes: Sequence[Shape]) -> Shape:
    """Return the shape whose ratio is nearest to that of an image's size; of equally near ones, the largest."""
    ratio = math.log(size[0] / size[1])
    return min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1]) - ratio), -shape[0] * shape[1], shape))


def fitted(image: Image.Image, shape: Shape) -> Image.Image:
    """Crop an image at the centre to a shape's ratio, and scale it to the shape."""
    height, width = shape
    scale = max(height / image.height, width / image.width)
    if scale == 1:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    right, bottom = (image.width + width / scale) / 2, (image.height + height / scale) / 2
    box = (max(image.width - right, 0), max(image.height - bottom, 0), min(right, image.width), min(bottom, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box)
