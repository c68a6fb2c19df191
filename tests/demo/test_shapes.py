"""The checker is what says whether a model draws what its caption says: it must pass true images and fail altered ones."""

import dataclasses
import itertools
import random

import numpy as np
import pytest

from edit_compile.demo import shapes, text


def some_scenes(count: int, seed: int = 3) -> list[shapes.Scene]:
    return list(itertools.islice(shapes.scenes(seed), count))


def test_true_images_pass():
    found = [c for s in some_scenes(400) for c in shapes.check(shapes.render(s), s)]
    assert all(c.colour_and_place for c in found)
    assert sum(c.shape for c in found) >= 0.99 * len(found)


def test_true_images_pass_under_noise():
    rng = np.random.default_rng(0)
    images = [(shapes.render(s) + rng.normal(0, 0.05, (32, 32, 3)).astype(np.float32), s) for s in some_scenes(200)]
    found = [c for p, s in images for c in shapes.check(p, s)]
    assert sum(c.colour_and_place for c in found) >= 0.99 * len(found)


@pytest.mark.parametrize(
    ("field", "values"),
    [("colour", sorted(shapes.COLOURS)), ("place", sorted(shapes.PLACES))],
)
def test_a_wrong_colour_or_place_fails(field: str, values: list):
    rng = random.Random(0)
    for scene in some_scenes(200):
        if len(scene.items) == 2:
            continue
        item = scene.items[0]
        other = rng.choice([v for v in values if v != getattr(item, field)])
        claimed = shapes.Scene(scene.background, (dataclasses.replace(item, **{field: other}),))
        (found,) = shapes.check(shapes.render(scene), claimed)
        assert not found.colour_and_place
        assert not found.shape


def test_a_wrong_shape_fails():
    rng = random.Random(0)
    wrong = []
    for scene in some_scenes(300):
        item = scene.items[0]
        other = rng.choice([s for s in shapes.SHAPES if s != item.shape])
        claimed = shapes.Scene(scene.background, (dataclasses.replace(item, shape=other), *scene.items[1:]))
        wrong.append(shapes.check(shapes.render(scene), claimed)[0].shape)
    assert sum(wrong) <= 0.01 * len(wrong)


def test_the_stream_is_reproducible_and_a_third_has_two_objects():
    assert some_scenes(20) == some_scenes(20)
    share = sum(len(s.items) == 2 for s in some_scenes(3000)) / 3000
    assert 0.3 < share < 0.367


def test_captions_have_at_least_twenty_words_the_encoder_knows():
    captions = [shapes.caption(s) for s in some_scenes(300)]
    tokens, pooled, mask = text.encode([*captions, ""])
    assert tokens.shape == (301, text.TEXT_LENGTH, text.TEXT_CHANNELS)
    assert pooled.shape == (301, text.TEXT_CHANNELS)
    assert mask[:-1].sum(1).min() >= 20
    assert mask[-1].sum() == 0


def test_an_unknown_word_is_named():
    with pytest.raises(ValueError, match="elephant"):
        text.encode(["a red elephant"])


def test_a_caption_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="32 words at most"):
        text.encode(["a " * 40])
