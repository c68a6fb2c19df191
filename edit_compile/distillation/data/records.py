"""Captioned pictures as they lie in files: names, encoded pictures and captions, decoded when needed."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from edit_compile.distillation.data.buckets import Shape

CAPTION_KEYS = ("caption", "text", "prompt")
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
log = logging.getLogger(__name__)
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: values that exchange height and width


@dataclass(frozen=True)
class Record:
    """One captioned picture.

    Attributes:
        name: what it is called when it must be named.
        picture: a file, its content, or the decoded picture.
    """

    name: str
    picture: Path | bytes | Image.Image
    caption: str


class Unreadable(Exception):
    """A sample cannot be used; the message says why. Sources replace it by another and name it."""


def note(skipped: dict[str, str], name: str, reason: Unreadable) -> None:
    """Add a sample to those that were skipped, once."""
    if name not in skipped:
        skipped[name] = str(reason)
        log.warning("skipped %s: %s", name, reason)


def some_of(skipped: Mapping[str, str]) -> str:
    """The first few of what was skipped, in words."""
    return "; ".join(f"{name}: {reason}" for name, reason in islice(skipped.items(), 3)) or "nothing was skipped"


def size_of(record: Record) -> Shape:
    """Height and width as the picture is to be looked at, from its header.

    Raises:
        Unreadable: it is no picture.
    """
    try:
        with _opened(record) as picture:
            turned = picture.getexif().get(_ORIENTATION) in _TURNED
            return (picture.width, picture.height) if turned else (picture.height, picture.width)
    except Exception as error:  # decoders of damaged pictures raise whatever they meet
        raise Unreadable(_reason(error)) from error


def picture_of(record: Record) -> Image.Image:
    """The picture as RGB, turned as its EXIF says, transparent parts on white.

    Raises:
        Unreadable: it cannot be decoded.
    """
    try:
        with _opened(record) as picture:
            upright = ImageOps.exif_transpose(picture)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            picture = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def caption_in(fields: Mapping[str, Any], key: str | None = None) -> str:
    """The caption among a record's fields: under `key`, or under a usual name. Of several captions the first.

    Raises:
        Unreadable: there is none, or it is no text.
    """
    keys = [key] if key is not None else [name for name in CAPTION_KEYS if name in fields]
    if not keys or keys[0] not in fields:
        raise Unreadable(f"it has no {key or ' or '.join(CAPTION_KEYS)}, but {', '.join(map(str, fields)) or 'nothing'}")
    value = fields[keys[0]]
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"its {keys[0]} is {'empty' if value in ('', None, []) else f'no text but {value!r:.40}'}")
    return value.strip()


def decoded_text(content: bytes) -> str:
    """A caption's file as text.

    Raises:
        Unreadable: it is no UTF-8.
    """
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Unreadable(f"its caption is no UTF-8: {error}") from error


def _opened(record: Record) -> Image.Image:
    if isinstance(record.picture, Image.Image):
        return record.picture.copy()
    return Image.open(io.BytesIO(record.picture) if isinstance(record.picture, bytes) else record.picture)


def _reason(error: Exception) -> str:
    return f"its picture cannot be read: {str(error).replace(chr(10), ' ') or type(error).__name__}"
