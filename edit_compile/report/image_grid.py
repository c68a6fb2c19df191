"""A labelled grid of images: a row for each prompt, a column for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edit_compile.errors import ConfigError
from edit_compile.files import replacing

_MARGIN, _GAP, _FONT_SIZE, _CAPTION_WIDTH = 16, 8, 15, 250
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_SMALLEST = 160  # smaller images are enlarged, pixel by pixel
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def image_grid(captions: Sequence[str], columns: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Image.Image:
    """Lay out images with their captions on the left and the columns' names on top.

    Args:
        captions: one for each row.
        columns: each a name and its images (height, width, 3) in [0, 1], one for each row; all of one size.
    """
    height, width, _ = columns[0][1][0].shape
    enlarged = max(1, -(-_SMALLEST // min(height, width)))
    height, width = height * enlarged, width * enlarged
    font = ImageFont.load_default(_FONT_SIZE)
    top = _MARGIN + 2 * _FONT_SIZE
    sheet = Image.new(
        "RGB",
        (_MARGIN + _CAPTION_WIDTH + len(columns) * (width + _GAP) + _MARGIN - _GAP, top + len(captions) * (height + _GAP) + _MARGIN - _GAP),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        lines = textwrap.wrap(caption, _CAPTION_WIDTH // (_FONT_SIZE // 2) - 2)
        draw.multiline_text((_MARGIN, top + row * (height + _GAP)), "\n".join(lines), _INK, font)
    for column, (name, images) in enumerate(columns):
        left = _MARGIN + _CAPTION_WIDTH + column * (width + _GAP)
        draw.text((left, _MARGIN), name, _INK, font)
        for row, pixels in enumerate(images):
            image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top + row * (height + _GAP)))
    return sheet


def image_format(path: Path) -> str:
    """Return the format that a file's ending stands for.

    Raises:
        ConfigError: it is not the ending of PNG, JPEG or WebP.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: images are written as {', '.join(_FORMATS)}, not as {path.suffix or 'a file without an ending'}")
    return _FORMATS[path.suffix.lower()]


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image, whole or not at all, in the format of the path's ending.

    Raises:
        ConfigError: as `image_format`.
    """
    kind = image_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format=kind)
