"""Sampling for grids and galleries, against a loop that is written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator

import toy_distill
from edit_compile.demo import models
from edit_compile.distillation.data import BatchRequest, open_source
from edit_compile.distillation.data.seeding import noise_for
from edit_compile.distillation.data.sources.shapes import ShapesData
from edit_compile.distillation.evaluate.sample_grid import sample, start_of


class Captioned(toy_distill.ToySource):
    """Text of zeros in the place of an empty caption."""

    def batch(self, request):
        found = super().batch(request)
        if request.empty_captions:
            found.conditions["text"] = torch.zeros_like(found.conditions["text"])
        return found


@pytest.mark.parametrize("guidance", [None, 1.0, 3.5])
def test_guidance_goes_from_the_empty_caption_to_the_own_and_on(guidance, monkeypatch):
    monkeypatch.setattr(toy_distill, "ToySource", Captioned)
    student, count, steps = toy_distill.student(), 2, 3
    context = toy_distill.context(student, Accelerator(cpu=True), samples={"count": count, "steps": steps, "guidance": guidance})
    found = sample(context, student, start_of(context, count, 12, 16))

    x = noise_for(range(count), (3, 12, 16), context.recipe.seed, "samples")
    text = context.source.batch(BatchRequest(0, count, range(count), 12, 16, "validation")).conditions["text"]
    times = [1000 * (1 - step / steps) for step in range(steps)] + [0.0]
    with torch.no_grad():
        for now, then in itertools.pairwise(times):
            own, empty = (toy_distill.denoise(student, x, torch.full((count,), now), {"text": each}) for each in (text, 0 * text))
            velocity = own if guidance is None else empty + guidance * (own - empty)
            x = x + (then - now) / 1000 * velocity
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_drawn_samples_have_the_same_image_with_the_empty_caption():
    source = open_source(ShapesData(caption_dropout=0), models.untrained("dit"), 0)
    own, empty = (source.batch(BatchRequest(0, 2, range(2), 32, 32, "validation", empty_captions=empty)) for empty in (False, True))
    assert torch.equal(own.latents, empty.latents)
    assert all(own.captions)
    assert empty.captions == ("", "")
