"""The checker of moving shapes passes true clips and fails altered ones, and the demo video model draws what its captions say."""

from __future__ import annotations

import dataclasses
import itertools
import random

import diffusers
import numpy as np
import pytest
import torch

from edit_compile.adapters.load_model import load_model
from edit_compile.demo import models, motion, shapes, text
from edit_compile.demo.prompt_adherence import motion_adherence


def some_clips(count: int, seed: int = 3) -> list[motion.Clip]:
    return list(itertools.islice(motion.clips(seed), count))


def altered(clip: motion.Clip, field: str, values: list[str], rng: random.Random) -> motion.Clip:
    return dataclasses.replace(clip, **{field: rng.choice([value for value in values if value != getattr(clip, field)])})


def test_true_clips_pass_under_noise():
    rng = np.random.default_rng(0)
    found = []
    for clip in some_clips(200):
        video = motion.render(clip)
        assert video.shape == (motion.FRAMES, motion.SIDE, motion.SIDE, 3)
        found.append(motion.check(video + rng.normal(0, 0.05, video.shape), clip))
    assert all(check.colour for check in found)
    assert sum(check.shape and check.motion for check in found) >= 0.99 * len(found)


def test_objects_stay_inside():
    reach = motion.RADIUS
    for clip in some_clips(300):
        for centre in motion.centres(clip):
            assert reach <= min(centre)
            assert max(centre) <= motion.SIDE - reach


@pytest.mark.parametrize(
    ("field", "values", "wrong"),
    [
        ("colour", list(shapes.COLOURS), "colour"),
        ("shape", list(shapes.SHAPES), "shape"),
        ("direction", list(motion.DIRECTIONS), "motion"),
        ("speed", list(motion.SPEEDS), "motion"),
    ],
)
def test_what_is_not_as_described_fails(field: str, values: list[str], wrong: str):
    rng = random.Random(0)
    found = [motion.check(motion.render(clip), altered(clip, field, values, rng)) for clip in some_clips(100)]
    assert sum(getattr(check, wrong) for check in found) <= 0.01 * len(found)


def test_shuffled_captions_are_obeyed_by_chance():
    """A sixth have the colour, a quarter of them the shape, an eighth of them the motion."""
    clips = some_clips(300)
    found = [motion.check(motion.render(clip), other) for clip, other in zip(clips, clips[1:] + clips[:1], strict=True)]
    assert sum(check.colour for check in found) <= 0.25 * len(found)
    assert sum(check.shape and check.motion for check in found) <= 0.03 * len(found)


def test_noise_and_stills_do_not_move():
    clip = some_clips(1)[0]
    noise = np.random.default_rng(0).random((motion.FRAMES, motion.SIDE, motion.SIDE, 3))
    assert not motion.check(noise, clip).colour
    still = motion.check(np.repeat(motion.render(clip)[:1], motion.FRAMES, 0), clip)
    assert (still.colour, still.shape, still.motion) == (True, True, False)


def test_each_model_knows_its_own_words_and_shares_their_vectors():
    captions = [motion.caption(clip) for clip in some_clips(50)]
    tokens, _, mask = text.encode([*captions, ""], text.MOTION_VOCABULARY)
    assert tokens.shape == (51, text.TEXT_LENGTH, text.TEXT_CHANNELS)
    assert mask.sum(1).tolist() == [10] * 50 + [0]
    with pytest.raises(ValueError, match=r"does not know \['moves'"):
        text.encode(captions)
    with pytest.raises(ValueError, match="picture"):
        text.encode(["a picture"], text.MOTION_VOCABULARY)


def test_words_of_the_image_models_keep_the_vectors_they_were_trained_with():
    assert text.encode(["a large red cross"])[0][0, :4, 0].tolist() == pytest.approx([-0.67309, 3.114617, -0.050967, 0.822386], abs=1e-5)


def test_the_video_model_samples_clips():
    model = models.untrained(models.VIDEO_NAME).eval()
    assert isinstance(model, diffusers.WanTransformer3DModel)
    assert sum(p.numel() for p in model.parameters()) <= 2 * 10**6
    clips = models.sample(model, ["a red circle moves left slowly on a black background"] * 2, steps=1)
    assert clips.shape == (2, 3, motion.FRAMES, motion.SIDE, motion.SIDE)
    assert torch.isfinite(clips).all()


def test_the_trained_model_obeys_its_captions():
    """`benchmarks/demo_models.py` measures 200 captions; these few catch a model that has come to harm."""
    found = motion_adherence(load_model("demo/video-dit").model, 16, steps=15)
    assert found.colour >= 0.9
    assert found.shape >= 0.8
    assert found.motion >= 0.7
