"""Aspect-ratio buckets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import edit_compile as ec
from edit_compile.distillation.data.buckets import Buckets, bucket_shapes, fitted, nearest_shape

sides = st.integers(1, 128)


@given(sides, sides, st.sampled_from([1, 2, 8, 16]), st.floats(1, 8))
def test_shapes_fit_the_model_and_are_at_most_the_resolutions_area(height, width, granularity, ratio):
    height, width = height * granularity, width * granularity
    shapes = bucket_shapes(height, width, granularity, Buckets(max_ratio=ratio))
    assert (height, width) in shapes
    assert len(set(shapes)) == len(shapes)
    for h, w in shapes:
        assert h % granularity == w % granularity == 0
        assert h * w <= height * width
        assert max(h / w, w / h) <= max(ratio, height / width, width / height)


def test_shapes_at_1024_pixels_are_the_usual_ones():
    shapes = bucket_shapes(1024, 1024, 16, Buckets())
    assert {(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (1408, 704)} <= set(shapes)
    assert all(h % 64 == w % 64 == 0 and h * w > 0.9 * 1024**2 for h, w in shapes)


@pytest.mark.parametrize("side", [512, 2048])
def test_ratios_are_the_same_at_every_resolution(side):
    scale = side / 1024
    expected = [(int(h * scale), int(w * scale)) for h, w in bucket_shapes(1024, 1024, 16, Buckets())]
    assert list(bucket_shapes(side, side, 16, Buckets())) == expected


def test_without_buckets_there_is_the_resolution_alone():
    assert bucket_shapes(512, 768, 16, None) == ((512, 768),)


@pytest.mark.parametrize(
    ("height", "buckets", "message"),
    [
        (520, None, "stage resolution 520 x 512: this model needs sides that are multiples of 16"),
        (512, Buckets(multiple=24), "data.buckets.multiple: 24: this model needs a multiple of 16"),
    ],
)
def test_what_the_model_cannot_divide_is_refused(height, buckets, message):
    with pytest.raises(ec.DistillError, match=message):
        bucket_shapes(height, 512, 16, buckets)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_an_image_goes_to_its_nearest_ratio(height, width):
    shapes = bucket_shapes(1024, 1024, 16, Buckets())
    h, w = nearest_shape((height, width), shapes)
    distances = [abs(math.log(a / b) - math.log(height / width)) for a, b in shapes]
    assert abs(math.log(h / w) - math.log(height / width)) == min(distances)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_fitted_images_have_their_shape(height, width, h, w):
    assert fitted(Image.new("RGB", (width, height)), (h, w)).size == (w, h)


def test_fitting_scales_to_cover_and_crops_at_the_centre():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # the middle third, the only part that a square keeps
    whole = np.asarray(fitted(Image.fromarray(pixels), (20, 20)))
    assert (whole == 255).all()
    half = np.asarray(fitted(Image.fromarray(pixels), (10, 10)))
    assert (half[:, 1:9] >= 250).all()
