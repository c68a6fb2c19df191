"""The checker of groups of shapes passes true images and fails altered ones, and reads what each word of a caption says."""

from __future__ import annotations

import dataclasses
import itertools
import random

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edit_compile.demo import groups, models, shapes, text

PROPERTIES = ("colour_and_place", "count", "size", "shape", "texture", "background", "nothing_else", "all")


def some_scenes(count: int, seed: int = 3) -> list[groups.Scene]:
    return list(itertools.islice(groups.scenes(seed), count))


def right(found: list[groups.GroupCheck], name: str) -> float:
    return sum(getattr(check, name) for check in found) / len(found)


def test_true_images_pass_under_noise():
    rng = np.random.default_rng(0)
    found = []
    for scene in some_scenes(150):
        image = groups.render(scene)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.float32
        found += groups.check(image + rng.normal(0, 0.05, image.shape).astype(np.float32), scene)
    for name in PROPERTIES:
        assert right(found, name) >= 0.97, name


@pytest.mark.parametrize(
    ("field", "values", "wrong"),
    [
        ("colour", list(shapes.COLOURS), "colour_and_place"),
        ("size", list(groups.SIZES), "size"),
        ("texture", list(groups.TEXTURES), "texture"),
        ("shape", list(shapes.SHAPES), "shape"),
    ],
)
def test_what_is_not_as_described_fails(field: str, values: list[str], wrong: str):
    rng = random.Random(0)
    found = []
    for scene in some_scenes(60):
        said = tuple(
            dataclasses.replace(group, **{field: rng.choice([value for value in values if value != getattr(group, field)])})
            for group in scene.groups
        )
        found += groups.check(groups.render(scene), groups.Scene(scene.background, said))
    assert right(found, wrong) <= 0.03
    assert right(found, "all") <= 0.01


def test_one_object_less_than_described_fails():
    found = []
    for scene in some_scenes(60):
        described = tuple(group for group in scene.groups if len(group.centres) > 1)
        drawn = tuple(dataclasses.replace(group, centres=group.centres[1:]) for group in described)
        image = groups.render(groups.Scene(scene.background, drawn))
        found += groups.check(image, groups.Scene(scene.background, described))
    assert len(found) > 60
    assert right(found, "colour_and_place") >= 0.5
    assert right(found, "count") == 0.0


def test_shuffled_captions_are_obeyed_by_chance():
    scenes = some_scenes(150)
    found = [
        check for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True) for check in groups.check(groups.render(scene), other)
    ]
    assert right(found, "colour_and_place") <= 0.2
    assert right(found, "all") <= 0.02


def changed(scene: groups.Scene, image: np.ndarray, what: str, rng: np.random.Generator) -> np.ndarray:
    """An image of a scene with something in it that its caption does not say."""
    group = scene.groups[0]
    rows, columns = (slice(32, None) if side in ("lower", "right") else slice(32) for side in group.place)
    other = np.asarray(next(rgb for name, rgb in shapes.COLOURS.items() if name != group.colour), np.float32) / 255
    wrong = image.copy()
    if what == "background":
        colour = np.asarray(shapes.BACKGROUNDS[scene.background], np.float32) / 255
        name = next(name for name in shapes.BACKGROUNDS if name != scene.background)
        wrong[np.abs(image - colour).max(-1) < 1e-6] = np.asarray(shapes.BACKGROUNDS[name], np.float32) / 255
    elif what == "specks":
        wrong[rows, columns][rng.random((32, 32)) < 0.4] = other
    else:
        empty = next(place for place in shapes.PLACES if place not in {one.place for one in scene.groups})
        rows, columns = (slice(40, 48) if side in ("lower", "right") else slice(8, 16) for side in empty)
        wrong[rows, columns] = other
    return wrong


@pytest.mark.parametrize("what", ["background", "specks", "another object"])
def test_what_the_caption_does_not_say_is_found(what: str):
    rng = np.random.default_rng(0)
    scenes = some_scenes(60)
    found = [groups.check(changed(scene, groups.render(scene), what, rng), scene)[0] for scene in scenes]
    assert right(found, "background" if what == "background" else "nothing_else") <= 0.05


def test_a_texture_may_begin_anywhere():
    scenes = some_scenes(60)
    moved = [np.roll(groups.render(scene), (1, 1), (0, 1)) for scene in scenes]
    found = [check for scene, image in zip(scenes, moved, strict=True) for check in groups.check(image, scene)]
    assert right(found, "texture") >= 0.95


def test_noise_is_nothing():
    scene = some_scenes(1)[0]
    noise = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    assert not any(check.all for check in groups.check(noise, scene))


def test_captions_tell_everything_but_the_cells():
    for scene in some_scenes(100):
        words = groups.caption(scene).split()
        assert len(words) in (28, 39)
        for group in scene.groups:
            count = next(word for word, number in groups.COUNTS.items() if number == len(group.centres))
            noun = group.shape if count == "one" else groups.PLURALS[group.shape]
            at = words.index(noun) if words.count(noun) == 1 else None
            if at is not None:
                assert words[at - 4 : at] == [count, group.size, group.texture, group.colour]
                assert words[at + 3 : at + 5] == list(group.place)


@pytest.mark.parametrize("side", [32, 128])
def test_the_same_scene_is_drawn_at_other_sides(side: int):
    for scene in some_scenes(20):
        drawn = torch.from_numpy(groups.render(scene, side)).permute(2, 0, 1)[None]
        at_64 = torch.from_numpy(groups.render(scene)).permute(2, 0, 1)[None]
        smaller = min(side, 64)
        difference = F.interpolate(drawn, smaller, mode="area") - F.interpolate(at_64, smaller, mode="area")
        assert difference.abs().mean() < 0.01


@pytest.mark.parametrize("name", models.LARGE_NAMES)
def test_the_models_take_the_captions_and_draw_64_pixels(name: str):
    model = models.untrained(name).eval()
    assert isinstance(model, diffusers.SD3Transformer2DModel | diffusers.PixArtTransformer2DModel)
    assert models.trained_on(model) == models.GROUPS
    images = models.sample(model, [groups.caption(scene) for scene in some_scenes(2)], steps=1)
    assert images.shape == (2, 3, 64, 64)
    assert torch.isfinite(images).all()
    with pytest.raises(ValueError, match="does not know"):
        models.conditions(model, ["a picture of nothing else"])
    with pytest.raises(ValueError, match="reads 40 words at most"):
        models.conditions(model, ["a picture " * 21])


def test_every_word_of_the_captions_has_a_vector():
    tokens, _, mask = text.encode([groups.caption(scene) for scene in some_scenes(100)], text.GROUP_VOCABULARY, text.GROUP_TEXT_LENGTH)
    assert tokens.shape == (100, 40, text.TEXT_CHANNELS)
    assert set(mask.sum(1).tolist()) == {28, 39}
