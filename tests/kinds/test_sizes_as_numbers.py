"""Sizes that reach a model or a site as Python numbers are sources of the grid, never constants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edit_compile as ec
from packed_model import Block, Packed, converted, latents, same_as_stated, words


def wave(h, w):
    return (torch.arange(h)[:, None] + 0.1 * torch.arange(w)[None]).reshape(h * w)


class Patched(nn.Module):
    """Images of 3 channels in patches of two; the blocks get `extra(h, w)` beside the tokens."""

    def __init__(self, block, extra):
        super().__init__()
        self.patch, self.packed, self.out = nn.Conv2d(3, 8, 2, 2), Packed(block), nn.ConvTranspose2d(8, 3, 2, 2)
        self.extra = extra

    def forward(self, x):
        y = self.patch(x)
        h, w = y.shape[2:]
        tokens = y.flatten(2).transpose(1, 2)
        y = self.packed.run(tokens, None, tokens[0, :, 0] * 0, *self.extra(h, w))
        return self.out(y.transpose(1, 2).unflatten(2, (h, w)))


def picture(h, w, batch=2):
    return {"x": torch.randn(batch, 3, 2 * h, 2 * w)}


# ------------------------------------------------------------------ sites


class GivenSizes(Block):
    def forward(self, x, size, depth):
        (h, w), _ = size
        y = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (h, w)), 3, 1, 1).flatten(2).transpose(1, 2)
        return super().forward(y * depth)


def test_a_site_takes_the_sizes_of_each_call():
    student = converted(Patched(GivenSizes, lambda h, w: (((h, w), "unused"), 2)), picture(6, 10))
    for h, w in ((6, 10), (8, 5), (3, 4)):
        same_as_stated(student, picture(h, w, batch=1), h, w)


class Branching(Block):
    def forward(self, x, h, w, depth):
        if depth > 3:
            x = x * 0.5
        if h % 2 == 0:
            x = x + 0.1
        return super().forward(x)


def test_what_a_site_asks_of_a_number_is_asked_in_every_call():
    student = converted(Patched(Branching, lambda h, w: (h, w, 5)), picture(6, 10))
    assert student(**picture(8, 5)).isfinite().all()
    with pytest.raises(ec.RewriteError, match=r"without this: not \(\(h % 2\) == 0\)"):
        student(**picture(7, 5))
    site = student.packed.blocks[0]
    with ec.grid(student, 6, 10):
        site(torch.randn(1, 60, 32), 6, 10, 4)
        with pytest.raises(ec.RewriteError, match=r"without this: not \(depth > 3\)"):
            site(torch.randn(1, 60, 32), 6, 10, 3)


class Listed(Block):
    def forward(self, x, shapes):
        _, h, w = shapes[0]
        return super().forward(x.unflatten(1, (h, w)).flatten(1, 2))


def test_a_list_by_sample_may_have_another_length():
    class Model(Patched):
        def forward(self, x):
            self.extra = lambda h, w: ([(1, h, w)] * len(x),)
            return super().forward(x)

    student = converted(Model(Listed, None), picture(6, 10))
    same_as_stated(student, picture(8, 5, batch=1), 8, 5)
    same_as_stated(student, picture(4, 7, batch=3), 4, 7)


# ------------------------------------------------------------------ models


class Numbers(Packed):
    def forward(self, image, text, height, width):
        return self.run(image, text, F.pad(wave(height // 16, width // 16), (text.shape[1], 0)))


def test_height_and_width_in_pixels():
    def given(h, w, text):
        return {"image": latents((h, w)), "text": words(text), "height": 16 * h, "width": 16 * w}

    student = converted(Numbers(), given(6, 10, 7))
    assert "height // 16" in str(ec.plan_of(student))
    same_as_stated(student, given(6, 10, 7), 6, 10)
    same_as_stated(student, given(8, 5, 11), 8, 5)
    with pytest.raises(ec.GridError, match="height='64'; its grid of image tokens follows from that number"):
        student(**{**given(4, 4, 3), "height": "64"})


class Unused(Packed):
    def forward(self, image, sizes, steps):
        return self.run(image, None, image[0, :, 0] * 0)


def test_numbers_that_only_equal_the_sizes_are_their_source_too():
    def given(h, w):
        return {"image": latents((h, w)), "sizes": {"rows": h, "columns": w}, "steps": 28}

    student = converted(Unused(), given(6, 10))
    same_as_stated(student, given(8, 5), 8, 5)


def test_numbers_that_tell_no_single_grid_are_no_source():
    plan = ec.plan(Unused(), example_inputs={"image": latents((6, 10)), "sizes": [(6, 10), (10, 6)], "steps": 28})
    assert plan.grid.kind == "given"


class OnlyPlainNumbers(Packed):
    """Its table is numpy's, which takes no symbolic numbers."""

    def forward(self, image, text, shapes):
        _, h, w = shapes[0]
        rows = torch.from_numpy(np.add.outer(np.sin(np.arange(h) / h), np.arange(w)).reshape(-1)).to(image.device)
        return self.run(image, text, F.pad(rows, (text.shape[1], 0)))


@pytest.mark.parametrize("frames", [1, 3])
def test_numbers_are_found_where_they_cannot_stay_open(frames):
    class Model(OnlyPlainNumbers):
        def forward(self, image, text, shapes):
            return super().forward(image, text, [(1, shapes[0][0] * shapes[0][1], shapes[0][2])])

    def given(h, w, text):
        return {"image": latents((frames, h, w)), "text": words(text), "shapes": [(frames, h, w)] * 2}

    student = converted(Model(), given(6, 10, 7))
    lead = () if frames == 1 else (frames,)
    same_as_stated(student, given(6, 10, 7), *lead, 6, 10)
    same_as_stated(student, given(8, 5, 7), *lead, 8, 5)


@pytest.mark.slow
@torch.no_grad()
def test_numbers_under_compile():
    def given(h, w, text):
        return {"image": latents((h, w)), "text": words(text), "height": 16 * h, "width": 16 * w}

    student = converted(Numbers(), given(6, 10, 7))
    compiled = torch.compile(student, backend="eager", dynamic=True, fullgraph=True)
    for call in (given(6, 10, 7), given(8, 5, 11)):
        torch.testing.assert_close(compiled(**call), student(**call), atol=1e-5, rtol=0)
