"""A labelled grid of images or videos: a row for each prompt, a column for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edit_compile.errors import ConfigError
from edit_compile.files import replacing

_MARGIN, _GAP, _FONT_SIZE, _LINE, _CAPTION_WIDTH = 16, 8, 15, 20, 250
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_SMALLEST, _SMALLEST_IN_STRIP = 160, 64  # smaller images and frames are enlarged, pixel by pixel
_STRIP_FRAMES, _STRIP_GAP = 8, 2
_MILLISECONDS = 125  # of a frame
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}

Columns = Sequence[tuple[str, Sequence[np.ndarray]]]  # each a name and its images or videos, one for each row; all of one size


def image_grid(captions: Sequence[str], columns: Columns) -> Image.Image:
    """Lay out images with the columns' names on top and captions on the left, cut where they are longer than the images are tall.

    Of videos, frames lie side by side.

    Args:
        captions: one for each row.
        columns: names, and images (height, width, 3) or videos (frames, height, width, 3) in [0, 1].
    """
    shown = [
        (name, [_strip(pixels) if pixels.ndim == 4 else _enlarged(pixels, _SMALLEST) for pixels in images]) for name, images in columns
    ]
    height, width, _ = shown[0][1][0].shape
    font = ImageFont.load_default(_FONT_SIZE)
    top = _MARGIN + 2 * _FONT_SIZE
    sheet = Image.new(
        "RGB",
        (_MARGIN + _CAPTION_WIDTH + len(columns) * (width + _GAP) + _MARGIN - _GAP, top + len(captions) * (height + _GAP) + _MARGIN - _GAP),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        lines = textwrap.wrap(caption, _CAPTION_WIDTH // (_FONT_SIZE // 2) - 2, max_lines=height // _LINE, placeholder=" ...")
        draw.multiline_text((_MARGIN, top + row * (height + _GAP)), "\n".join(lines), _INK, font)
    for column, (name, images) in enumerate(shown):
        left = _MARGIN + _CAPTION_WIDTH + column * (width + _GAP)
        draw.text((left, _MARGIN), name, _INK, font)
        for row, pixels in enumerate(images):
            image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
            sheet.paste(image, (left, top + row * (height + _GAP)))
    return sheet


def animated_grid(captions: Sequence[str], columns: Columns) -> list[Image.Image]:
    """Lay out each frame of videos (frames, height, width, 3) in [0, 1], as `image_grid` lays out images."""
    frames = len(columns[0][1][0])
    return [image_grid(captions, [(name, [video[time] for video in videos]) for name, videos in columns]) for time in range(frames)]


def _enlarged(image: np.ndarray, smallest: int) -> np.ndarray:
    """Repeat the pixels of an image (height, width, 3) until its shorter side has at least `smallest`."""
    times = max(1, -(-smallest // min(image.shape[:2])))
    return image.repeat(times, 0).repeat(times, 1)


def _strip(video: np.ndarray) -> np.ndarray:
    """Lay frames of a video (frames, height, width, 3) side by side, evenly chosen if there are many: (height, width', 3)."""
    chosen = np.linspace(0, len(video) - 1, min(len(video), _STRIP_FRAMES)).round().astype(int)
    frames = [_enlarged(video[index], _SMALLEST_IN_STRIP) for index in chosen]
    gap = np.ones((frames[0].shape[0], _STRIP_GAP, 3), frames[0].dtype)
    return np.concatenate([part for frame in frames for part in (gap, frame)][1:], 1)


def image_format(path: Path) -> str:
    """Return the format that a file's ending stands for.

    Raises:
        ConfigError: it is not the ending of PNG, JPEG, WebP or GIF.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: images are written as {', '.join(_FORMATS)}, not as {path.suffix or 'a file without an ending'}")
    return _FORMATS[path.suffix.lower()]


def save_image(image: Image.Image, path: Path, *further: Image.Image) -> None:
    """Write an image, whole or not at all, in the format of the path's ending; with further images, an animated GIF of all.

    Raises:
        ConfigError: as `image_format`.
    """
    kind = image_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    motion = {"save_all": True, "append_images": further, "duration": _MILLISECONDS, "loop": 0} if further else {}
    with replacing(path) as temporary:
        image.save(temporary, format=kind, **motion)
