"""What models drew: kept, read back, and laid out as a gallery."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edit_compile.demo import models
from edit_compile.demo.features import frechet_distance
from edit_compile.demo.prompt_adherence import group_adherence, held_out
from edit_compile.study import drawn
from edit_compile.study.drawn import DRAWN, Drawn, draw_demo, gallery_columns, has_features, real_features


def some(captions=("a", "b"), shape=(4, 6, 3), features=None):
    rng = np.random.default_rng(0)
    return Drawn(captions, tuple(rng.random(shape, np.float32) for _ in captions), features)


@pytest.mark.parametrize("shape", [(4, 6, 3), (2, 4, 6, 3)], ids=["images", "videos"])
def test_it_is_read_as_it_was_saved(tmp_path, shape):
    one = some(shape=shape, features=torch.rand(5, 3, dtype=torch.float64))
    one.save(tmp_path / "new", "the model")
    found = Drawn.read(tmp_path / "new", "the model")
    assert found.captions == one.captions
    assert torch.equal(found.features, one.features)
    np.testing.assert_allclose(np.stack(found.images), np.stack(one.images), atol=0.5 / 255 + 1e-6)
    assert Drawn.read(tmp_path, "the model") is None
    assert Drawn.read(tmp_path / "new", "another") is None
    (tmp_path / "new" / DRAWN).write_bytes(b"damaged")
    assert Drawn.read(tmp_path / "new", "the model") is None


def test_the_gallery_has_the_rows_that_all_drew():
    captions, columns = gallery_columns([("teacher", some()), ("other", some(("c", "d"))), ("none", None), ("same", some())], 1)
    assert captions == ("a",)
    assert [(name, len(images)) for name, images in columns] == [("teacher", 1), ("same", 1)]
    assert gallery_columns([("none", None)], 3) == ((), [])


def test_a_demo_model_draws_what_its_adherence_is_measured_on(monkeypatch):
    model = models.untrained("dit-64").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    monkeypatch.setattr(drawn, "KEPT_IMAGES", 1)
    one, adherence = draw_demo(model, 2, 1)
    assert adherence == group_adherence(model, 2, steps=1)
    assert one.captions == held_out(models.GROUPS, 2).captions[:1]
    assert one.images[0].shape == (64, 64, 3)
    assert one.features.shape == real_features(models.GROUPS, 2).shape
    assert frechet_distance(one.features, real_features(models.GROUPS, 2)) > 1


def test_which_demos_have_features():
    asked = held_out(models.SHAPES, 3)
    assert len(asked.captions) == 3
    assert [has_features(data) for data in (models.GROUPS, models.SHAPES, models.CLIPS)] == [True, True, False]
