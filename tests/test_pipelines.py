"""Whole diffusers pipelines, assembled from tiny random components, with a converted transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import edit_compile as ec
import toy
from edit_compile.cli import main
from edit_compile.student.site import converted_sites
from pipelines import PIPELINES, quiet

pytestmark = pytest.mark.usefixtures("compiled_once")

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
SIZES = ((32, 48), (48, 48))


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


@pytest.fixture(scope="module")
def options(pipe):
    return CALL | ({"use_resolution_binning": False} if type(pipe).__name__.startswith("PixArt") else {})


@pytest.fixture(scope="module")
def student(pipe):
    converted = ec.linearize(pipe)
    toy.shaken(nn.ModuleList(converted_sites(converted.transformer).values()), amount=0.05)
    return converted


def test_from_a_pipelines_folder_to_pictures_of_both_at_the_command_line(tmp_path):
    PIPELINES["sd3"]().save_pretrained(tmp_path / "pipe")
    convert = ["convert", "--model", tmp_path / "pipe", "-o", tmp_path / "converted"]
    sample = ["sample", tmp_path / "converted", "--prompt", "a red circle", "--steps", 2, "-o", tmp_path / "grid.png"]
    for arguments in (convert, [*sample, "--height", 64, "--width", 64]):
        result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, "--dtype", "bfloat16")])
        assert result.exit_code == 0, result.stderr
    (weights,) = (tmp_path / "converted").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
    assert len(np.unique(pixels[50:200, 280:420])) > 16  # something was drawn


def draw(pipe, options, height, width):
    return pipe(**options, height=height, width=width, generator=torch.Generator().manual_seed(0)).images


def test_without_example_inputs_and_run_at_two_sizes_with_guidance(pipe, student, options):
    assert type(student) is type(pipe)
    assert student.vae is pipe.vae
    assert student._progress_bar_config == pipe._progress_bar_config
    assert isinstance(student.transformer, type(pipe.transformer))
    for size in SIZES:
        before, after = draw(pipe, options, *size), draw(student, options, *size)
        with ec.teacher(student):
            assert np.array_equal(draw(student, options, *size), before)
        assert after.shape == (1, *size, 3)
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after)


@pytest.mark.slow
def test_recorded_inputs_give_the_adapters_plan(pipe, student):
    inputs = ec.record(pipe, height=32, width=48)
    assert not pipe.transformer._forward_pre_hooks
    assert inputs["hidden_states"].shape[0] > 1
    recorded = ec.plan(pipe, example_inputs=inputs)
    assert [(site.path, site.action) for site in recorded.sites] == [(site.path, site.action) for site in ec.plan_of(student).sites]
    assert type(recorded.grid) is type(ec.plan_of(student).grid)


def test_save_and_load_pipeline(pipe, student, options, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    base = quiet(DiffusionPipeline.from_pretrained(tmp_path / "base"))
    converted = ec.linearize(base, plan=ec.plan_of(student))
    converted.transformer.load_state_dict(student.transformer.state_dict())
    expected = draw(student, options, *SIZES[0])
    ec.save(converted, tmp_path / "student")
    assert np.array_equal(draw(quiet(ec.load_pipeline(tmp_path / "student")), options, *SIZES[0]), expected)
    with pytest.raises(ec.CheckpointError, match="cannot be loaded as a pipeline"):
        ec.load_pipeline(tmp_path / "student", base=tmp_path / "nowhere")
    with pytest.raises(ec.CheckpointError, match=r"is not a pipeline with a transformer or a UNet; without one: edit_compile\.load"):
        ec.load_pipeline(tmp_path / "student", base=pipe.transformer)


def test_save_pretrained_of_the_pipeline_is_a_whole(pipe, student, options, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = quiet(ec.load_pipeline(tmp_path))
    assert np.array_equal(draw(loaded, options, *SIZES[0]), draw(student, options, *SIZES[0]))
    original = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert np.array_equal(draw(original, options, *SIZES[0]), draw(pipe, options, *SIZES[0]))
    assert torch.equal(ec.load(tmp_path).state_dict()["proj_out.weight"], student.transformer.proj_out.weight)


def test_record_says_what_went_wrong(pipe):
    with pytest.raises(ec.NoExampleInputsError, match=r"no module 'unet'; it has: .*transformer"):
        ec.record(pipe, component="unet")
    with pytest.raises(ec.NoExampleInputsError, match="failed before it called its transformer"):
        ec.record(pipe, height=33, width=47, prompt=3)
