"""Stages of a recipe say how many frames their videos have."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

import edit_compile as ec
from edit_compile.adapters.noise_schedule import DynamicShift, NoiseSchedule
from edit_compile.demo import models
from edit_compile.distillation import dry_run as module
from edit_compile.distillation.context import Context
from edit_compile.distillation.data import BatchRequest, SourceContext, open_source
from edit_compile.distillation.data.sources.pipeline import PipelineData
from edit_compile.distillation.data.sources.random import RandomSource
from edit_compile.distillation.data.sources.shapes import MovingShapesData
from edit_compile.distillation.dry_run import dry_run
from edit_compile.distillation.models import check_frames_of
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import Recipe
from pipelines import T5_DIM, quiet, t5_encoder, t5_tokenizer, unet_pipeline

VIDEO = f"demo/{models.VIDEO_NAME}"
PHASE = {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1}


def recipe(model=VIDEO, data=None, layerwise=None, **stage):
    content = {"model": model, "data": data or {"kind": "random"}, "stages": [{"resolution": 24, **PHASE, **stage}]}
    return Recipe.model_validate(content | ({} if layerwise is None else {"layerwise": PHASE | layerwise}))


def test_the_layerwise_fit_has_the_first_stages_frames():
    assert [phase.frames for phase in phases_of(recipe(frames=4, layerwise={}))] == [4, 4]
    assert [phase.frames for phase in phases_of(recipe(frames=4, layerwise={"frames": 2}))] == [2, 4]
    assert [phase.frames for phase in phases_of(recipe(layerwise={}))] == [None, None]
    called = {"kind": "pipeline", "path": "prompts.txt", "call": {"num_frames": 17}}
    assert [phase.frames for phase in phases_of(recipe(data=called, layerwise={"frames": 9}))] == [9, 17]


def convert_once(recipe, monkeypatch):
    """Let all dry runs have the same student: conversion takes most of their time."""
    student = module.make_student(recipe, structure_only=True)
    monkeypatch.setattr(module, "make_student", lambda recipe, structure_only: student)


@pytest.mark.slow
def test_a_dry_run_counts_frames(monkeypatch):
    convert_once(recipe(), monkeypatch)

    def phase(**stage):
        found = dry_run(recipe(**stage))
        assert found.errors == {}
        return found.phases[0]

    usual, eight, sixteen = phase(), phase(frames=8), phase(frames=16)
    assert usual == eight
    assert [usual.size, sixteen.size] == ["8 x 24 x 24", "16 x 24 x 24"]
    assert 2 < sixteen.flops / eight.flops < 3  # the teacher's attention is quadratic
    assert sixteen.bytes > eight.bytes


@pytest.mark.parametrize(
    ("model", "frames", "message"),
    [
        ("demo/dit", 8, r"^stages\.0\.frames: PixArtTransformer2DModel makes images, not videos of 8 frames: leave frames out$"),
        ("arch/wan2.1-t2v-14b", 80, r"^stages\.0\.frames: WanTransformer3DModel does not support 80 frames; it is usually used with 81$"),
    ],
)
def test_what_a_model_cannot_make_is_refused(model, frames, message):
    structure = ec.load_model(model, structure_only=True).model
    with pytest.raises(ec.DistillError, match=message):
        check_frames_of(recipe(model, frames=frames), structure)
    check_frames_of(recipe(model), structure)


def test_the_demos_videos_have_eight_frames():
    source = open_source(MovingShapesData(), models.untrained(models.VIDEO_NAME), 0)
    source.check(24, 24, 8)
    with pytest.raises(ec.DistillError, match=r"^moving shapes are videos of 8 frames, not 4: leave frames out$"):
        source.check(24, 24, 4)


def test_sources_make_as_many_frames_as_are_asked_for():
    source = RandomSource(models.untrained(models.VIDEO_NAME), 0)
    source.check(24, 24, 5)
    assert source.batch(BatchRequest(0, 2, range(2), 24, 16, frames=5)).latents.shape == (2, 3, 5, 24, 16)


def test_a_shift_that_depends_on_tokens_counts_those_of_all_frames():
    model, schedule = models.untrained(models.VIDEO_NAME), NoiseSchedule("rectified-flow", dynamic=DynamicShift((100, 0.5), (400, 1.5)))
    context = Context(recipe(), model, model, None, None, schedule, None)
    for frames, tokens in ((2, 2 * 36), (None, 8 * 36)):
        assert context.schedule_at(24, 24, frames).shift == pytest.approx(math.exp(0.5 + (tokens - 100) / 300))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A tiny pipeline of videos: a frame of tokens stands for four, a token for 16 x 16 pixels."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=T5_DIM, freq_dim=16, ffn_dim=32, num_layers=1
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    folder = tmp_path_factory.mktemp("wan")
    quiet(
        WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=transformer.eval(),
        )
    ).save_pretrained(folder)
    (folder / "prompts.txt").write_text("a lion\na tiger\n")
    return folder


def test_a_pipeline_makes_as_many_frames_as_a_stage_says(wan):
    model = ec.load_model(str(wan)).model
    data = PipelineData(kind="pipeline", path=wan / "prompts.txt", call={"num_inference_steps": 1, "num_frames": 5})
    source = data.open(SourceContext(model, 0, str(wan), torch.device("cpu"), torch.float32))
    for frames, latent in ((9, 3), (None, 2)):
        request = BatchRequest(0, 1, range(1), 32, 48, "validation", frames)
        assert source.recorded(request, torch.tensor([500.0])).arguments["hidden_states"].shape == (1, 4, latent, 4, 6)


@pytest.mark.slow
def test_a_dry_run_of_recorded_calls_asks_the_pipeline(wan, monkeypatch):
    data = {"kind": "pipeline", "path": str(wan / "prompts.txt"), "call": {"guidance_scale": 5.0}}
    kinds = (data, {"kind": "random"})
    convert_once(recipe(str(wan)), monkeypatch)
    called, random = (dry_run(recipe(str(wan), kind, resolution=[32, 48], frames=9)) for kind in kinds)
    assert called.errors == random.errors == {}
    assert called.phases[0].size == "9 x 32 x 48"
    assert called.phases[0].flops == random.phases[0].flops  # this pipeline calls the model once with and once without the prompt


@pytest.mark.slow
def test_a_dry_run_of_recorded_calls_needs_no_adapter(tmp_path, monkeypatch):
    unet_pipeline().save_pretrained(tmp_path)
    convert_once(recipe(str(tmp_path)), monkeypatch)

    def phase(**call):
        data = {"kind": "pipeline", "path": "prompts.txt", "call": call}
        found = dry_run(recipe(str(tmp_path), data, layerwise={}, resolution=[64, 96]))
        assert found.errors == {}
        return found.phases[1]

    assert phase(guidance_scale=5.0).flops == 2 * phase(guidance_scale=1.0).flops  # with and without the prompt


def test_a_pipeline_of_images_takes_no_frames(tmp_path):
    unet_pipeline().save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    data = {"kind": "pipeline", "path": str(tmp_path / "prompts.txt"), "call": {"num_inference_steps": 1}}
    model = ec.load_model(str(tmp_path)).model
    source = open_source(recipe(data=data).data, model, 0, base=str(tmp_path))
    with pytest.raises(ec.DistillError, match=r"^StableDiffusionPipeline takes no num_frames: leave frames out of the recipe$"):
        source.check(64, 96, 5)
