"""Where the grid of image tokens comes from: position ids of any form, nested inputs; and sequences that are no images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edit_compile as ec
from edit_compile.ir.position_ids import grids_of_ids
from packed_model import Packed, converted, latents, positions, same_as_stated, words

# ------------------------------------------------------------------ reading ids


@pytest.mark.parametrize(
    "ids",
    [
        positions(6, 10, "thwl"),
        positions(6, 10, "lhwt"),
        positions(6, 10, "hw"),
        positions(6, 10, "wh"),
        positions(6, 10, "whtl"),
        positions(6, 10, "hwhw"),
        positions(6, 10).expand(2, -1, -1),
        positions(6, 10, start=-7.5),
        positions(6, 10, step=16),
        positions(6, 10, step=-1),
        positions(6, 10, start=-0.93, step=0.0173).bfloat16(),
        positions(6, 10).long(),
    ],
    ids=["thwl", "lhwt", "hw", "wh", "whtl", "twice", "batch", "centred", "step", "downwards", "bfloat16", "whole"],
)
def test_ids_enumerate_a_grid_in_whichever_columns(ids):
    assert grids_of_ids(ids, "ids") == ((6, 10),)


def test_frames_may_be_at_uneven_times():
    ids = torch.cat([positions(4, 5, "twh", t=time) for time in (0.0, 1.0, 9.0, 17.0)])
    assert grids_of_ids(ids, "ids") == ((4, 4, 5),)


@pytest.mark.parametrize(
    ("ids", "sizes"), [(positions(1, 7), (1, 7)), (positions(7, 1), (7, 1)), (positions(1, 1), (1, 1))], ids=["row", "column", "token"]
)
def test_one_row_or_column_is_what_its_column_counts(ids, sizes):
    assert grids_of_ids(ids, "ids", rows_and_columns=(1, 2)) == (sizes,)


@pytest.mark.parametrize(
    "ids",
    [positions(6, 10)[torch.randperm(60)], positions(6, 10)[:57], positions(6, 10)[3:], torch.zeros(7, 3), positions(3, 3).T[None, :, :1]],
    ids=["shuffled", "cut off", "begun late", "zeros", "no columns"],
)
def test_what_is_no_grid_is_refused(ids):
    with pytest.raises(ec.GridError, match=r"ids (names|of shape)[^\n]*$"):
        grids_of_ids(ids, "ids")


def test_windows_are_no_images():
    ids = positions(4, 6, "hw").unflatten(0, (2, 2, 3, 2)).transpose(1, 2).flatten(0, 3)
    with pytest.raises(ec.GridError, match="not full grids in row-major order"):
        grids_of_ids(ids, "ids")


def test_samples_on_other_grids_are_refused():
    with pytest.raises(ec.GridError, match="other grids from sample to sample"):
        grids_of_ids(torch.stack([positions(4, 6), positions(6, 4)]), "ids")


# ------------------------------------------------------------------ models


class ByIds(Packed):
    def forward(self, image, text, image_ids, text_ids):
        return self.run(image, text, torch.cat([text_ids, image_ids], -2).sum(-1))


def ids_given(h, w, *, text=7, batch=2, **form):
    ids = positions(h, w, **form)
    return {
        "image": latents((h, w), batch=batch),
        "text": words(text, batch),
        "image_ids": ids,
        "text_ids": torch.zeros(text, ids.shape[1]),
    }


@pytest.mark.parametrize("columns", ["thwl", "whl"])
def test_models_with_ids_of_any_columns_find_their_grid(columns):
    student = converted(ByIds(), ids_given(6, 10, columns=columns))
    same_as_stated(student, ids_given(6, 10, columns=columns), 6, 10)
    same_as_stated(student, ids_given(8, 5, columns=columns, text=11, batch=1), 8, 5)
    same_as_stated(student, ids_given(5, 1, columns=columns, text=3, batch=1), 5, 1)


class ByTransposedIds(Packed):
    text_first = False

    def forward(self, image, text, places):
        return self.run(image, text, nn.functional.pad(places.sum(0), (0, text.shape[1])))


def test_ids_may_have_their_tokens_last():
    def given(h, w, text):
        return {"image": latents((h, w)), "text": words(text), "places": positions(h, w).T.contiguous()}

    student = converted(ByTransposedIds(), given(6, 10, 7))
    same_as_stated(student, given(6, 10, 7), 6, 10)
    same_as_stated(student, given(9, 4, 12), 9, 4)


class OneTable(Packed):
    def forward(self, image, text, ids):
        return self.run(image, text, ids.sum(-1))


@pytest.mark.parametrize("text_first", [True, False])
def test_text_and_image_ids_may_share_a_table(text_first):
    def given(h, w, text):
        ids = [torch.zeros(text, 3), positions(h, w)]
        return {"image": latents((h, w)), "text": words(text), "ids": torch.cat(ids if text_first else ids[::-1])[None].repeat(2, 1, 1)}

    model = OneTable()
    model.text_first = text_first
    student = converted(model, given(6, 10, 7))
    assert ec.plan_of(student).grid.kind == "ids"
    same_as_stated(student, given(6, 10, 7), 6, 10)
    same_as_stated(student, given(8, 5, 13), 8, 5)
    with pytest.raises(ec.GridError, match="4 x 4 = 16, but there are 60 image tokens"), ec.grid(student, 4, 4):
        student(**given(6, 10, 7))


class Nested(nn.Module):
    """Images (C, H, W) in a list, in a dict of inputs."""

    def __init__(self):
        super().__init__()
        self.patch, self.packed, self.out = nn.Conv2d(3, 8, 2, 2), Packed(), nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, batch):
        y = self.patch(torch.stack(batch["images"]))
        tokens = y.flatten(2).transpose(1, 2)
        return self.out(self.packed.run(tokens, None, tokens[0, :, 0] * 0).transpose(1, 2).unflatten(2, y.shape[2:]))


def test_sizes_are_found_in_nested_inputs():
    def given(h, w, batch=2):
        return {"batch": {"images": [torch.randn(3, 2 * h, 2 * w) for _ in range(batch)]}}

    student = converted(Nested(), given(6, 10))
    assert "batch['images'][0].shape[1] // 2" in str(ec.plan_of(student))
    same_as_stated(student, given(6, 10), 6, 10)
    same_as_stated(student, given(8, 5), 8, 5)
    same_as_stated(student, given(4, 7, batch=1), 4, 7)
    with pytest.raises(ec.GridError, match=r"batch\['images'\]\[0\]=NoneType"):
        student(batch={"images": [], "others": torch.zeros(1)})


# ------------------------------------------------------------------ no pictures


class Plain(Packed):
    def forward(self, x):
        return self.run(x, None, x[0, :, 0] * 0)


def test_a_plain_sequence_is_planned_and_its_plan_asks_for_the_grid():
    student = converted_without_teacher(Plain(), {"x": latents((6, 10))})
    assert "the grid must be given" in str(ec.plan_of(student))
    with pytest.raises(ec.GridError, match=r"wrap the call in edit_compile.grid\(model, height, width\)"):
        student(x=latents((6, 10)))
    for h, w in ((6, 10), (8, 5)):
        with ec.grid(student, h, w), torch.no_grad():
            assert student(x=latents((h, w))).isfinite().all()
    with ec.grid(student, 6, 10), pytest.raises(ec.GridError, match="6 x 10 = 60, but there are 40 image tokens"):
        student(x=latents((8, 5)))


def test_ids_that_count_along_one_line_are_no_picture():
    class Line(Packed):
        def forward(self, x, ids):
            return self.run(x, None, ids.sum(-1))

    ids = positions(60, 1)
    plan = ec.plan(Line(), example_inputs={"x": latents((60, 1)), "ids": ids})
    assert plan.grid.kind == "given"


def converted_without_teacher(model, example):
    return ec.linearize(model.eval(), example_inputs=example)


@pytest.mark.parametrize("grid", [(), (6,), (6, 0), (6, -1), (6.0, 2), (2, 3, 4, 5), ((6, 10), 3), ((6, 10), (1,)), ("ab",), (True, 2)])
def test_what_is_no_grid_cannot_be_stated(grid):
    student = converted_without_teacher(Plain(), {"x": latents((6, 10))})
    with pytest.raises(ec.GridError, match="two positive whole numbers"), ec.grid(student, *grid):
        pass
