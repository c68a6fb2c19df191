"""From image files to upright images of 8 bits a channel, within bounds: whatever has no certain meaning is a `BadSample`."""

from __future__ import annotations

import io
import mimetypes
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.records import BadSample, Record

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS, MAX_RATIO, MAX_BYTES = 8192 * 8192, 16, 2**29
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: values that exchange height and width
_BITS_PER_SAMPLE = 258  # of TIFF
_AT_MOST_16_BITS = ("PNG", "PPM")  # the formats that Pillow may open in mode I, of 32 bits
_ROWS = 512  # that are converted at a time, of images of whatever size


def looks_like_image(name: str) -> bool:
    """Say whether a file's name is that of an image, of a kind that is read or of another."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES or (mimetypes.guess_type(name)[0] or "").startswith("image/")


def size_of(record: Record) -> Shape:
    """Return the height and width of the upright image, from its header.

    Raises:
        BadSample: it is not an image, or too large or too narrow to be used.
    """
    try:
        with _opened(record) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except BadSample:
        raise
    except Exception as error:  # decoders raise all kinds of errors on damaged images
        raise BadSample(_reason(error)) from error


def image_of(record: Record) -> Image.Image:
    """Decode the image to RGB, turned as its EXIF says, transparent parts on white.

    Raises:
        BadSample: it cannot be decoded, or as `size_of`.
    """
    try:
        with _opened(record) as image:
            white = _white(image)
            ImageOps.exif_transpose(image, in_place=True)
            upright = image if white is None else _of_eight_bits(image, white)
            return _on_white(upright) if upright.has_transparency_data else upright.convert("RGB")
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(_reason(error)) from error


def _opened(record: Record) -> Image.Image:
    if isinstance(record.image, Image.Image):
        image = record.image.copy()
    else:
        if isinstance(record.image, Path) and record.image.exists():
            if not record.image.is_file():
                raise BadSample("it is not a regular file")  # reading from a pipe or a device may never end
            if (size := record.image.stat().st_size) > MAX_BYTES:
                raise BadSample(f"it has {size:,} bytes, more than {MAX_BYTES:,}")
        image = Image.open(io.BytesIO(record.image) if isinstance(record.image, bytes) else record.image, formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}: make it smaller")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise BadSample(f"it has {image.width} x {image.height} pixels, a ratio above {MAX_RATIO}: crop it")
    return image


@cache
def _formats() -> list[str]:
    """List the formats of the endings that are read. Pillow knows others, of which some start programs, as EPS does."""
    return sorted({kind for ending, kind in Image.registered_extensions().items() if ending in IMAGE_SUFFIXES})


def _white(image: Image.Image) -> float | None:
    """Return which grey value is white where Pillow does not know it, None where it does.

    Raises:
        BadSample: it is not certain.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _AT_MOST_16_BITS):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]  # in TIFF it may be 12
        return float(2**bits - 1)
    if image.mode == "I":
        raise BadSample("its pixels are integers of 32 bits, of which it is not certain which is white: save it with 8 or 16 bits")
    return 1.0 if image.mode == "F" else None


def _of_eight_bits(image: Image.Image, white: float) -> Image.Image:
    """Scale grey values so that `white` is 255.

    Raises:
        BadSample: they are not from 0 to `white`.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):
        raise BadSample(f"its pixels reach from {low:g} to {high:g}: scale them to 0 to {white:g}")
    scaled = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _ROWS):
        scaled[top : top + _ROWS] = (values[top : top + _ROWS].astype(np.float64) / white * 255).round()
    eight = Image.fromarray(scaled)
    if isinstance(transparent := image.info.get("transparency"), int):
        eight.putalpha(Image.fromarray((values != transparent) * np.uint8(255)))
    return eight


def _on_white(image: Image.Image) -> Image.Image:
    """Put an image with transparent parts on white, some rows at a time."""
    found = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):
        layer = image.crop((0, top, image.width, min(top + _ROWS, image.height))).convert("RGBA")
        found.paste(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"), (0, top))
    return found


def _reason(error: Exception) -> str:
    return f"its image cannot be read: {str(error).replace(chr(10), ' ') or type(error).__name__}"
