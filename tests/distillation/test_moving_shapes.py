"""A video model is distilled as an image model is: data, layerwise fit, losses, validation, sample grids, cost."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

import edit_compile as ec
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.bench import cost
from edit_compile.demo import models, motion, text
from edit_compile.distillation import distill
from edit_compile.distillation.data import BatchRequest, open_source
from edit_compile.distillation.data.sources.shapes import MovingShapesData, ShapesData
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import DistillError
from edit_compile.student.site import converted_sites

pytestmark = pytest.mark.usefixtures("compiled_once")

PHASE = {"steps": 2, "global_batch_size": 2, "lr": 1e-3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def student() -> torch.nn.Module:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=1,
        attention_head_dim=24,
        in_channels=models.RGB + models.POSITION_CHANNELS,
        out_channels=models.RGB,
        text_dim=text.TEXT_CHANNELS,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    return ec.linearize(model.eval())


def test_distill_end_to_end(student, tmp_path):
    recipe = Recipe.model_validate(
        {
            "model": "demo/video-dit",
            "data": {"kind": "moving-shapes"},
            "layerwise": PHASE,
            "stages": [{"resolution": 24, **PHASE}],
            "validation": {"samples": 4, "batch_size": 2},
            "samples": {"count": 2, "steps": 2},
        }
    )
    result = distill(recipe, tmp_path / "run", student=student, schedule=NoiseSchedule("rectified-flow"))
    assert len(converted_sites(student)) == 2
    assert math.isfinite(result.after.total)
    assert result.speeds
    (strip,), (clip,) = ([*(tmp_path / "run" / "samples").glob(f"*.{kind}")] for kind in ("png", "gif"))
    with Image.open(clip) as animation, Image.open(strip) as image:
        assert animation.n_frames == motion.FRAMES
        assert image.width > 2 * motion.FRAMES * 64


def test_costs_name_frames(student):
    (found,) = cost(student, [(4, 24, 48)]).costs
    assert (found.size, found.image) == ("4 x 24 x 48", 4 * 6 * 12)


def test_clips_of_other_sizes_are_scaled(student):
    source = open_source(MovingShapesData(), student, 0)
    batch = source.batch(BatchRequest(0, 2, range(2), 32, 48))
    assert batch.latents.shape == (2, 3, motion.FRAMES, 32, 48)
    own = source.batch(BatchRequest(0, 2, range(2), motion.SIDE, motion.SIDE)).latents
    assert batch.latents.mean() == pytest.approx(own.mean().item(), abs=0.02)
    assert torch.equal(own, source.batch(BatchRequest(0, 2, range(2), motion.SIDE, motion.SIDE)).latents)


def test_images_and_videos_are_not_mixed_up(student):
    with pytest.raises(DistillError, match=r"data.kind: shapes is not what this \w+ was trained on; use moving-shapes"):
        open_source(ShapesData(), student, 0)
    with pytest.raises(DistillError, match=r"data.kind: moving-shapes is not what this \w+ was trained on; use shapes"):
        open_source(MovingShapesData(), models.untrained("dit"), 0)
