"""Several images in one sequence: each has its own grid, told by ids, by lists of sizes, or stated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edit_compile as ec
from edit_compile.ir.position_ids import grids_of_ids
from packed_model import HEADS, Packed, converted, latents, positions, same_as_stated, words

# ------------------------------------------------------------------ ids


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ([positions(6, 10), positions(8, 4, t=1)], ((6, 10), (8, 4))),
        ([positions(6, 10), positions(8, 4, t=10), positions(3, 3, t=20)], ((6, 10), (8, 4), (3, 3))),
        ([positions(6, 10, "hw"), positions(8, 4, "hw")], ((6, 10), (8, 4))),
        ([positions(6, 10), positions(6, 4, t=1)], ((6, 10), (6, 4))),
        ([positions(6, 10), positions(8, 10, t=1)], ((6, 10), (8, 10))),
        ([positions(6, 10), positions(5, 1, t=1), positions(1, 4, t=2)], ((6, 10), (5, 1), (1, 4))),
    ],
    ids=["by index", "three", "by restart", "equal heights", "equal widths", "lines"],
)
def test_ids_of_several_images(parts, sizes):
    assert grids_of_ids(torch.cat(parts), "ids") == sizes


class ByIds(Packed):
    def forward(self, image, image_ids, text=None):
        ids = image_ids.sum(-1)
        return self.run(image, text, ids if text is None else F.pad(ids, (text.shape[1], 0)))


def given(*grids, text=7, batch=2):
    ids = torch.cat([positions(*grid, t=float(i)) for i, grid in enumerate(grids)])
    return {"image": latents(*grids, batch=batch), "image_ids": ids} | ({"text": words(text, batch)} if text else {})


@pytest.fixture(scope="module")
def student():
    return converted(ByIds(), given((6, 10), (8, 4)))


def test_images_told_apart_by_ids(student):
    same_as_stated(student, given((6, 10), (8, 4)), (6, 10), (8, 4))
    same_as_stated(student, given((5, 4), (3, 7), (4, 4), text=11, batch=1), (5, 4), (3, 7), (4, 4))
    same_as_stated(student, given((8, 5), text=3, batch=1), 8, 5)


def test_a_stated_grid_is_of_all_image_tokens(student):
    with pytest.raises(ec.GridError, match="6 x 10 = 60, but there are 92 image tokens"), ec.grid(student, 6, 10):
        student(**given((6, 10), (8, 4)))
    with pytest.raises(ec.GridError, match=r"6 x 10 \+ 4 x 4 = 76, but there are 92"), ec.grid(student, (6, 10), (4, 4)):
        student(**given((6, 10), (8, 4)))


@pytest.mark.slow
@torch.no_grad()
def test_several_images_under_compile(student):
    ec.compile(copy := ec.linearize(ByIds().eval(), example_inputs=given((6, 10), (8, 4))), backend="eager")
    copy.load_state_dict(student.state_dict())
    for grids in (((6, 10), (8, 4)), ((5, 4), (3, 7)), ((8, 5),)):
        call = given(*grids)
        torch.testing.assert_close(copy(**call), student(**call), atol=1e-5, rtol=0)
    whole = torch.compile(student, backend="eager", dynamic=True, fullgraph=True)
    call = given((5, 4), (3, 7))
    with ec.grid(student, (5, 4), (3, 7)):
        torch.testing.assert_close(whole(**call), student(**call), atol=1e-5, rtol=0)


# ------------------------------------------------------------------ against the formula, in float64


def convolved(module: nn.Module, tokens: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Run a module that maps images on each image of a sequence (N, C)."""
    cut = tokens.split([h * w for h, w in grids])
    images = [module(part.T.unflatten(1, grid)[None])[0].flatten(1).T for part, grid in zip(cut, grids, strict=True)]
    return torch.cat(images)


@torch.no_grad()
def test_each_image_is_convolved_by_itself_and_all_attend_to_all():
    grids = ((5, 4), (3, 7))
    student = converted(ByIds(), given((6, 10), (8, 4), text=0)).double()
    site = student.blocks[0]
    x = torch.randn(1, 41, 32, dtype=torch.float64)
    y = site.norm(x[0])
    query = F.linear(convolved(site.edit.query, y, grids), site.qkv.weight[:32], site.qkv.bias[:32])
    key, value = (convolved(m, part, grids) for m, part in zip((site.edit.key, site.edit.value), site.qkv(y).chunk(3, -1)[1:], strict=True))
    heads = []
    for q, k, v in zip(*(t.unflatten(1, (HEADS, -1)).transpose(0, 1) for t in (query, key, value)), strict=True):
        weights = q.relu() @ k.relu().T  # all queries by all compressed keys, as the formula has it
        heads.append(weights @ v / weights.sum(1, keepdim=True).clamp(min=1e-6 * len(k)))
    expected = x + site.out(torch.cat(heads, 1))
    with ec.grid(student, *grids):
        torch.testing.assert_close(site(x), expected, atol=1e-9, rtol=0)


# ------------------------------------------------------------------ lists of sizes


class ByShapes(Packed):
    def forward(self, image, text, shapes):
        images = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
        table = torch.cat([(torch.arange(t * h)[:, None] + 0.1 * torch.arange(w)[None]).reshape(t * h * w) for t, h, w in images])
        return self.run(image, text, F.pad(table.to(image.device), (text.shape[1], 0)))


def listed(*grids, text=7, batch=2, flat=False):
    sizes = [(1, *grid) for grid in grids]
    return {"image": latents(*grids, batch=batch), "text": words(text, batch), "shapes": (sizes if flat else [sizes]) * batch}


@pytest.mark.parametrize("example", [listed((6, 10), flat=True), listed((6, 10)), listed((6, 10), (8, 4))], ids=["flat", "one", "two"])
def test_lists_of_sizes_tell_each_images_grid(example):
    student = converted(ByShapes(), example)
    same_as_stated(student, listed((5, 4), (3, 7), batch=1), (5, 4), (3, 7))
    same_as_stated(student, listed((8, 5), text=11, flat=True), 8, 5)
    same_as_stated(student, listed((8, 5), text=11), 8, 5)


# ------------------------------------------------------------------ only the caller knows


class Untold(Packed):
    def forward(self, image, text):
        return self.run(image, text, F.pad(image[0, :, 0] * 0, (text.shape[1], 0)))


@torch.no_grad()
def test_several_grids_can_be_stated():
    student = converted_untold()
    call = {"image": latents((5, 4), (3, 7)), "text": words(5)}
    with ec.grid(student, (5, 4), (3, 7)):
        both = student(**call)
    with ec.grid(student, (41, 1)):
        assert (student(**call) - both).abs().max() > 1e-4


def converted_untold():
    torch.manual_seed(0)
    student = ec.linearize(Untold().eval(), example_inputs={"image": latents((6, 10)), "text": words()})
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".edit." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return student
