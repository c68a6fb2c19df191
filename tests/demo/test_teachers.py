"""The demo teachers are real: small files that diffusers loads, and that draw what their captions say."""

from __future__ import annotations

import diffusers
import pytest
import torch

from edit_compile.adapters.load_model import load_model
from edit_compile.demo import models, shapes
from edit_compile.demo.prompt_adherence import group_adherence, held_out_scenes, prompt_adherence

MOST_BYTES = 8 * 10**6


KINDS = {
    "mm-dit": diffusers.SD3Transformer2DModel,
    "dit": diffusers.PixArtTransformer2DModel,
    "mm-dit-64": diffusers.SD3Transformer2DModel,
    "dit-64": diffusers.PixArtTransformer2DModel,
    "video-dit": diffusers.WanTransformer3DModel,
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_it_is_small_and_diffusers_loads_it(name, kind):
    folder = models.folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    model = kind.from_pretrained(folder)
    assert model.config.num_layers == models.untrained(name).config.num_layers


@pytest.mark.parametrize("name", models.IMAGE_NAMES)
def test_it_draws_what_the_caption_says(name):
    """`benchmarks/demo_models.py` measures 200 captions; these few catch a model that has come to harm."""
    found = prompt_adherence(load_model(f"demo/{name}").model, 16, steps=15)
    assert found.objects >= 16
    assert found.colour_and_place >= 0.9
    assert found.shape >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", models.LARGE_NAMES)
def test_it_draws_the_groups_that_the_caption_says(name):
    found = group_adherence(load_model(f"demo/{name}").model, 8, steps=15)
    assert found.groups >= 16
    assert found.colour_and_place >= 0.8
    assert min(found.count, found.size, found.shape, found.texture) >= 0.6


def test_another_caption_gives_another_image():
    first, second = (shapes.caption(scene) for scene in held_out_scenes(2))
    model = load_model("demo/mm-dit").model
    assert not torch.equal(models.sample(model, [first], steps=2), models.sample(model, [second], steps=2))


def test_prompt_adherence_counts_wrong_images():
    """A model that draws nothing but noise is detected."""
    scenes = held_out_scenes(20)
    noise = torch.rand(20, 32, 32, 3, generator=torch.Generator().manual_seed(0)).numpy()
    found = [check for image, scene in zip(noise, scenes, strict=True) for check in shapes.check(image, scene)]
    assert sum(check.colour_and_place for check in found) <= 0.2 * len(found)
