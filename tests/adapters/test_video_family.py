"""Videos have frames: in example inputs, in sizes, and in costs."""

from __future__ import annotations

import pytest
import torch

from edit_compile.adapters.denoise import denoise, random_batch
from edit_compile.adapters.encoders import make_encoder
from edit_compile.adapters.inputs import default_sizes, example_inputs, inputs_for_size
from edit_compile.demo import models
from edit_compile.errors import DistillError, GridError


@pytest.fixture(scope="module")
def video() -> torch.nn.Module:
    return models.untrained(models.VIDEO_NAME).eval()


def test_sizes_have_frames(video):
    assert default_sizes(video) == ((8, 24, 24), (8, 48, 48), (8, 96, 96))
    assert example_inputs(video)["hidden_states"].shape == (2, 31, 5, 24, 36)
    made = inputs_for_size(video, 24, 32, frames=3)
    assert (made.grid, made.frames) == ((3, 6, 8), 3)
    assert made.inputs["hidden_states"].shape == (1, 31, 3, 24, 32)
    assert inputs_for_size(video, 24, 32).grid == (8, 6, 8)


def test_a_random_batch_is_a_video(video):
    x, conditions = random_batch(video, 24, 16, 2)
    assert x.shape == (2, 3, 8, 24, 16)
    with torch.no_grad():
        assert denoise(video, x, torch.full((2,), 500.0), conditions).shape == x.shape


def test_latents_of_a_full_size_model_are_compressed_in_time():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1)
    assert inputs_for_size(model, 720, 1280).grid == (21, 45, 80)
    assert inputs_for_size(model, 480, 832, frames=5).grid == (2, 30, 52)
    with pytest.raises(GridError, match="does not support 80 frames; it is usually used with 81"):
        inputs_for_size(model, 720, 1280, frames=80)


def test_hunyuan_videos_inputs_are_those_of_its_forward():
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=24, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=1.0, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(8, 8, 8),
    )  # fmt: skip
    x, conditions = random_batch(model, 32, 48, 2, frames=9)
    assert x.shape == (2, 4, 3, 4, 6)
    with torch.no_grad():
        assert denoise(model, x, torch.full((2,), 500.0), conditions).shape == x.shape
    assert inputs_for_size(model, 720, 1280).grid == (33, 45, 80)
    assert default_sizes(model)[-1] == (129, 720, 1280)


def test_data_of_images_are_refused(video):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        wan = WanTransformer3DModel(num_layers=1)
    for model, base, kind in ((video, f"demo/{models.VIDEO_NAME}", "moving-shapes"), (wan, "some/pipeline", "pipeline")):
        with pytest.raises(DistillError, match=f"{base} makes videos, and these data are images; use data of kind {kind}"):
            make_encoder(model, base, torch.device("cpu"), torch.float32, None)


def test_a_model_of_images_takes_no_frames():
    with pytest.raises(GridError, match="makes images, not videos of 8 frames"):
        inputs_for_size(models.untrained("dit"), 32, 32, frames=8)
