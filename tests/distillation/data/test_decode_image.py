"""Image files of all kinds: what they show at 8 bits, or why they are not used."""

from __future__ import annotations

import io
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edit_compile.distillation.data import decode_image
from edit_compile.distillation.data.buckets import fitted
from edit_compile.distillation.data.decode_image import image_of, size_of
from edit_compile.distillation.data.records import BadSample, Record

RAMP = np.tile(np.linspace(0, 1, 32), (8, 1))
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 12, 3), np.uint8))


def stored(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return Record("x", content.getvalue(), ("caption",))


def grey(record):
    pixels = np.asarray(image_of(record)).astype(float)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_8(kind):
    record = stored(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), kind)
    np.testing.assert_allclose(grey(record), RAMP * 255, atol=0.51)
    assert size_of(record) == (8, 32)


def test_12_bits_in_a_tiff_are_scaled_to_8():
    values = (RAMP * 4095).round().astype(np.uint16)
    packed = np.stack([values[:, 0::2] >> 4, (values[:, 0::2] & 15) << 4 | values[:, 1::2] >> 8, values[:, 1::2] & 255], -1)
    data = packed.astype(np.uint8).tobytes()
    entries = [
        (256, 4, 32),
        (257, 4, 8),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 8),
        (279, 4, len(data)),
    ]
    tags = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, value in entries
    )
    header = b"II*\0" + (8 + len(data)).to_bytes(4, "little")
    content = header + data + len(entries).to_bytes(2, "little") + tags + bytes(4)
    np.testing.assert_allclose(grey(Record("x", content, ("c",))), RAMP * 255, atol=0.51)


def test_floating_point_from_0_to_1_is_read():
    np.testing.assert_allclose(grey(stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF")), RAMP * 255, atol=0.51)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP.astype(np.float32) * 255, "its pixels reach from 0 to 255: scale them to 0 to 1"),
        (RAMP.astype(np.float32) - 0.5, "reach from -0.5 to 0.5"),
        (np.full((4, 4), np.nan, np.float32), "reach from nan to nan"),
        ((RAMP * 255).astype(np.int32), "integers of 32 bits, of which it is not certain which is white"),
    ],
)
def test_values_of_no_certain_meaning_are_refused(pixels, message):
    with pytest.raises(BadSample, match=message):
        image_of(stored(Image.fromarray(pixels), "TIFF"))


def test_what_is_transparent_is_white_in_16_bits_too():
    values = np.full((4, 4), 20_000, np.uint16)
    values[:2] = 7
    pixels = grey(stored(Image.fromarray(values), "PNG", transparency=7))
    assert (pixels[:2] == 255).all()
    assert (pixels[2:] == round(20_000 / 257)).all()


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"])
def test_kinds_of_files(kind):
    suffixes = {suffix for suffix, own in Image.registered_extensions().items() if own == kind}
    assert suffixes & decode_image.IMAGE_SUFFIXES
    assert image_of(stored(Image.new("RGB", (12, 20), (200, 100, 50)), kind)).size == (12, 20)


def test_turned_by_exif_in_16_bits():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    record = stored(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "PNG", exif=exif)
    assert size_of(record) == (32, 8)
    np.testing.assert_allclose(grey(record), np.rot90(RAMP, -1) * 255, atol=0.51)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 100_000), (33, 2)])
def test_very_narrow_images_are_refused_from_their_header(size):
    with pytest.raises(BadSample, match=rf"it has {size[0]} x {size[1]} pixels, a ratio above 16"):
        size_of(stored(Image.new("1", size), "PNG"))


def test_very_large_images_are_refused_from_their_header():
    record = stored(Image.new("1", (9000, 9000)), "PNG")
    tracemalloc.start()
    with pytest.raises(BadSample, match="it has 9000 x 9000 pixels, more than 67,108,864"):
        image_of(record)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_not_read(tmp_path, make):
    make(tmp_path / "a.png")
    with pytest.raises(BadSample, match="it is not a regular file"):
        size_of(Record("x", tmp_path / "a.png", ("c",)))


def test_very_large_files_are_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(stored(RGB, "PNG").image)
    os.truncate(path, 2**40)
    with pytest.raises(BadSample, match=r"it has 1,099,511,627,776 bytes, more than 536,870,912"):
        size_of(Record("x", path, ("c",)))


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"\xd7\xcd\xc6\x9a" + bytes(200)])
def test_formats_that_start_programs_are_not_read_whatever_their_ending(content):
    with pytest.raises(BadSample, match="cannot identify image file"):
        image_of(Record("x", content, ("c",)))


@pytest.mark.parametrize("kind", ["16 bits", "palette", "alpha"])
def test_large_images_are_converted_a_part_at_a_time(kind):
    values = np.random.default_rng(0).integers(0, 256, (1100, 70), np.uint8)
    if kind == "16 bits":
        record, expected = stored(Image.fromarray(values.astype(np.uint16) * 257), "PNG"), np.stack([values] * 3, -1)
    else:
        layer = Image.fromarray(np.stack([values, values[::-1], values.T.reshape(1100, 70), values], -1), "RGBA")
        layer = layer.quantize(9) if kind == "palette" else layer
        whole = layer.convert("RGBA")
        record = stored(layer, "PNG")
        expected = np.asarray(Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(image_of(record)), expected)


def test_16_bits_take_little_more_memory_than_they_have():
    record = stored(Image.fromarray(np.zeros((4096, 2048), np.uint16)), "PNG")
    tracemalloc.start()
    image_of(record)
    assert tracemalloc.get_traced_memory()[1] < 8 * 4096 * 2048
    tracemalloc.stop()


@given(st.binary(max_size=300))
def test_bytes_that_are_no_image_are_bad_samples(content):
    for cut in (content, b"\x89PNG\r\n\x1a\n" + content, b"II*\0" + content, b"GIF89a" + content):
        with pytest.raises(BadSample):
            image_of(Record("x", cut, ("c",)))


@given(st.integers(20, 60), st.integers(20, 60), st.integers(4, 40), st.integers(4, 40))
def test_fitting_crops_before_it_scales(height, width, h, w):
    """It shows the centre at one scale in both directions: a ramp over x stays a ramp of the same slope, and y does not matter."""
    ramp = np.tile(np.arange(width, dtype=np.float32), (height, 1))
    found = np.asarray(fitted(Image.fromarray(ramp), (h, w)))
    scale = max(h / height, w / width)
    expected = (np.arange(w) + 0.5 - w / 2) / scale + width / 2 - 0.5
    inner = slice(w // 4, w - w // 4)  # Lanczos flattens a ramp near the image's own edges
    np.testing.assert_allclose(found[:, inner], np.tile(expected[inner], (h, 1)), atol=0.75)
