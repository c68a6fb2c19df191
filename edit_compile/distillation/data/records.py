"""Captioned images as they are stored: names, encoded images and captions, decoded when needed; and those that cannot be."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

from edit_compile.distillation.data.buckets import Shape
from edit_compile.files import write_text

CAPTION_KEYS = ("caption", "text", "prompt")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SKIPPED_FILE = "unreadable.json"
log = logging.getLogger(__name__)
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: values that exchange height and width


@dataclass(frozen=True)
class Record:
    """One captioned image.

    Attributes:
        name: what it is called in messages.
        image: a file, its content, or the decoded image.
    """

    name: str
    image: Path | bytes | Image.Image
    caption: str


class BadSample(Exception):
    """A sample cannot be used; the message says why."""


NamedRecord = tuple[str, Record | BadSample]


class RecordDataset(Protocol):
    """Records by index. `record` raises BadSample."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def record(self, index: int) -> Record: ...


def log_skip(skipped: dict[str, str], name: str, reason: BadSample) -> None:
    """Add a sample to those that were skipped, and log it the first time."""
    if name not in skipped:
        skipped[name] = str(reason)
        log.warning("skipped %s: %s", name, reason)


def summarize(skipped: Mapping[str, str]) -> str:
    """Describe the first few of the skipped samples."""
    return "; ".join(f"{name}: {reason}" for name, reason in islice(skipped.items(), 3)) or "nothing was skipped"


def write_skipped(folder: Path, skipped: Mapping[str, str]) -> None:
    """Write the skipped samples and the reasons to a file, and log their number. Without any, the file is removed."""
    path = folder / SKIPPED_FILE
    if not skipped:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps(dict(skipped), indent=2, ensure_ascii=False))
    log.warning("%d sample%s could not be read: see %s", len(skipped), "" if len(skipped) == 1 else "s", path)


def size_of(record: Record) -> Shape:
    """Return the height and width of the upright image, from its header.

    Raises:
        BadSample: it is not an image.
    """
    try:
        with _opened(record) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # decoders raise all kinds of errors on damaged images
        raise BadSample(_reason(error)) from error


def image_of(record: Record) -> Image.Image:
    """Decode the image to RGB, turned as its EXIF says, transparent parts on white.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        with _opened(record) as image:
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            layer = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    except Exception as error:
        raise BadSample(_reason(error)) from error


def caption_in(fields: Mapping[str, Any], key: str | None = None) -> str:
    """Find the caption among a record's fields: under `key`, or under a usual name. Of several captions, take the first.

    Raises:
        BadSample: there is none, or it is not text.
    """
    keys = [key] if key is not None else [name for name in CAPTION_KEYS if name in fields]
    if not keys or keys[0] not in fields:
        raise BadSample(f"it has no {key or ' or '.join(CAPTION_KEYS)}, but {', '.join(map(str, fields)) or 'nothing'}")
    value = fields[keys[0]]
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"its {keys[0]} is {'empty' if value in ('', None, []) else f'not text but {value!r:.40}'}")
    return value.strip()


def decoded_text(content: bytes) -> str:
    """Decode a caption's file.

    Raises:
        BadSample: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"its caption is not UTF-8: {error}") from error


def _opened(record: Record) -> Image.Image:
    if isinstance(record.image, Image.Image):
        return record.image.copy()
    return Image.open(io.BytesIO(record.image) if isinstance(record.image, bytes) else record.image)


def _reason(error: Exception) -> str:
    return f"its image cannot be read: {str(error).replace(chr(10), ' ') or type(error).__name__}"
