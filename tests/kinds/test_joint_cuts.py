"""A joint sequence that is cut between projection and attention: at the ends of its segments, or inside the text."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec
from small_picture import HEADS, PATCH, WIDTH, Picture

SIZES = ((2, 6, 10, 7), (1, 8, 5, 11))  # batch, height and width in image tokens, text tokens: of the example, and of another call
REGISTERS = 3
DIM = WIDTH // HEADS


class Joint(nn.Module):
    """Attention over image, text and registers in an order; `change` makes queries and keys of it, the image's from `start` to `stop`."""

    def __init__(self, order: str, change, heads_first: bool = True):
        super().__init__()
        self.order, self.change, self.dim = order, change, 2 if heads_first else 1
        self.qkv, self.out, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(DIM)
        self.registers = nn.Parameter(torch.randn(1, REGISTERS, WIDTH))
        self.register_buffer("speeds", torch.tensor([0.1, 0.03, 0.7, 0.2]))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        parts = {"i": x, "t": text, "r": self.registers.expand(x.shape[0], -1, -1)}
        sizes = [parts[letter].shape[1] for letter in self.order]
        start = sum(sizes[: self.order.index("i")])
        stop = start + x.shape[1]
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.qkv(torch.cat([parts[letter] for letter in self.order], 1)).chunk(3, -1))
        if self.dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = (self.change(self, t, start, stop, sizes) for t in (q, k))
        if self.dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
        return x + self.out(y[:, start:stop])


class PictureWithText(Picture):
    def __init__(self, block):
        super().__init__(block)
        self.text = nn.Linear(5, WIDTH)

    def forward(self, x, text):
        self.words = self.text(text)
        return super().forward(x)

    def run(self, y):
        for block in self.blocks:
            y = block(y, self.words)
        return y


def scaled(t: Tensor, site: nn.Module) -> Tensor:
    return t * 0.8


def rotated(t: Tensor, site: nn.Module) -> Tensor:
    return rotate(t, torch.arange(t.shape[site.dim], device=t.device), site)


def normed(t: Tensor, site: nn.Module) -> Tensor:
    return site.norm(t)


def rotate(t: Tensor, places: Tensor, site: nn.Module) -> Tensor:
    angle = (places[:, None] * site.speeds).to(t.dtype)
    angle = angle if site.dim == 2 else angle[:, None]
    a, b = t.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def sliced(site, t, start, stop, sizes):
    before, image, after = (t[:, :, a:b] for a, b in ((0, start), (start, stop), (stop, None)))
    return torch.cat([before, scaled(image, site), after], 2)


def sliced_from_the_end(site, t, start, stop, sizes):
    behind = sum(sizes) - stop
    image = t[:, :, start - sum(sizes) : -behind] if behind else t[:, :, start - sum(sizes) :]
    return torch.cat([t[:, :, : -behind - (stop - start)], scaled(image, site), t[:, :, t.shape[2] - behind :]], 2)


def narrowed(site, t, start, stop, sizes):
    after = t.narrow(2, stop, t.shape[2] - stop)
    return torch.cat([t.narrow(2, 0, start), scaled(t.narrow(2, start, stop - start), site), after], 2)


def split(site, t, start, stop, sizes, each=scaled):
    parts = list(t.split(sizes, site.dim))
    at = site.order.index("i")
    parts[at] = each(parts[at], site)
    return torch.cat(parts, site.dim)


def split_at_places(site, t, start, stop, sizes):
    before, image, after = t.tensor_split([start, stop], 2)
    return torch.cat([before, scaled(image, site), after], 2)


def picked(site, t, start, stop, sizes):
    places = torch.arange(stop - start, device=t.device) + start
    before, after = (t[:, :, torch.arange(a, b, device=t.device)] for a, b in ((0, start), (stop, sum(sizes))))
    return torch.cat([before, scaled(t.index_select(2, places), site), after], 2)


def written_in_place(site, t, start, stop, sizes):
    t = t.clone()
    t[:, :, start:stop] = scaled(t[:, :, start:stop], site)
    return t


def chosen_by_place(site, t, start, stop, sizes):
    places = torch.arange(t.shape[2], device=t.device)
    return torch.where(((places >= start) & (places < stop))[:, None], scaled(t, site), t)


def split_and_rotated(site, t, start, stop, sizes):
    return split(site, t, start, stop, sizes, rotated)


def rotated_as_a_whole(site, t, start, stop, sizes):
    """What `split_and_rotated` computes: tokens beside the image are turned by nothing."""
    counted = torch.arange(t.shape[site.dim], device=t.device) - start
    inside = (counted >= 0) & (counted < stop - start)
    return rotate(t, counted * inside, site)


def split_and_normed(site, t, start, stop, sizes):
    return split(site, t, start, stop, sizes, normed)


def inputs(batch, height, width, words):
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, 4, PATCH * height, PATCH * width, generator=generator)
    return {"x": x, "text": torch.randn(batch, words, 5, generator=generator)}


@cache
def outputs(order, change, heads_first=True):
    """Convert, hold the teacher to the original, and return the student's outputs at both sizes."""
    model = PictureWithText(lambda: Joint(order, change, heads_first)).eval()
    student = ec.linearize(model, example_inputs=inputs(*SIZES[0]))
    assert [site.action for site in ec.plan_of(student).sites] == ["mm-edit", "mm-edit"]
    found = []
    with torch.no_grad():
        for size in SIZES:
            original = model(**inputs(*size))
            found.append(student(**inputs(*size)))
            assert (found[-1] - original).abs().max() > 1e-4
            with ec.teacher(student):
                torch.testing.assert_close(student(**inputs(*size)), original, atol=1e-5, rtol=0)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "change"),
    [
        ("it", sliced),
        ("tir", sliced_from_the_end),
        ("it", sliced_from_the_end),
        ("rti", narrowed),
        ("it", split_at_places),
        ("tir", picked),
        ("ti", written_in_place),
        ("tir", chosen_by_place),
    ],
)
def test_the_way_of_cutting_makes_no_difference(order, change):
    for found, expected in zip(outputs(order, change), outputs(order, split), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("order", "heads_first"), [("tir", True), ("it", False)])
def test_a_rotation_of_the_image_alone_is_one_of_the_whole_that_turns_the_text_by_nothing(order, heads_first):
    pairs = zip(outputs(order, split_and_rotated, heads_first), outputs(order, rotated_as_a_whole, heads_first), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_norm_of_the_image_alone():
    assert len(outputs("rti", split_and_normed)) == len(SIZES)


def cut_in_the_text(site, t, start, stop, sizes):
    return torch.cat([t[:, :, :3] * 1.1, t[:, :, 3:-2], t[:, :, -2:] * 0.9], 2)


def test_a_cut_in_the_text():
    assert len(outputs("tir", cut_in_the_text)) == len(SIZES)


@pytest.mark.parametrize("order", ["it", "ti"])
def test_a_cut_in_the_image_is_refused(order):
    model = PictureWithText(lambda: Joint(order, cut_in_the_text)).eval()
    (reason,) = {site.reason for site in ec.plan(model, example_inputs=inputs(*SIZES[0])).sites}
    assert "cuts through the image tokens" in reason


def at_a_number(site, t, start, stop, sizes):
    return torch.cat([t[:, :, :60] * 0.9, t[:, :, 60:]], 2)


def test_a_number_that_happens_to_be_the_images_end_is_refused():
    model = PictureWithText(lambda: Joint("it", at_a_number)).eval()
    (reason,) = {site.reason for site in ec.plan(model, example_inputs=inputs(*SIZES[0])).sites}
    assert "at a place that does not follow from the grid" in reason
