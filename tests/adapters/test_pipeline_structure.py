"""What a pipeline's denoiser is called with, recorded without weights."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline

import edit_compile as ec
from edit_compile.adapters.pipeline_structure import pipeline_structure
from edit_compile.adapters.record_inputs import inputs_of
from edit_compile.cli import main
from pipelines import PIPELINES, quiet, unet_pipeline


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    unet_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_without_weights_the_inputs_have_the_shapes_and_types_that_they_have_with_them(name, tmp_path):
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    expected = ec.record(pipe)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    found = ec.record(pipeline_structure(str(tmp_path)))
    assert described(found) == described(expected)
    if "img_ids" in found:  # values that the pipeline computes are real
        assert torch.equal(found["img_ids"], expected["img_ids"])


def described(inputs):
    return {name: (x.shape, x.dtype, x.device.type) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


@pytest.mark.slow
def test_a_unets_pipeline_is_converted_by_its_folder_alone_and_draws(unet_folder, tmp_path):
    result = CliRunner().invoke(main, ["convert", str(unet_folder), "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    rewritten = {site["path"] for site in plan["sites"] if site["action"] != "keep"}
    assert len(rewritten) >= 3
    assert all(".attn1" in path or "mid_block" in path for path in rewritten)
    pipe = quiet(ec.load_pipeline(tmp_path / "out"))
    call = {"prompt": "a red circle", "num_inference_steps": 1, "height": 64, "width": 96, "output_type": "latent"}
    student = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with ec.teacher(pipe):
        teacher = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    original = unet_pipeline()(**call, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(teacher, original)
    assert not torch.equal(student, original)


@pytest.mark.slow
def test_a_pipeline_in_memory_tells_its_unets_inputs():
    pipe = unet_pipeline()
    inputs = inputs_of(pipe.unet, pipe)
    assert inputs["sample"].shape[1:] == (4, 64, 96)
    assert isinstance(ec.linearize(pipe), StableDiffusionPipeline)


def test_a_missing_part_is_named(unet_folder, tmp_path):
    index = json.loads((unet_folder / "model_index.json").read_text())
    for part in unet_folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["nolibrary", "NoTokenizer"]}))
    with pytest.raises(ec.ModelNotFoundError, match="needs NoTokenizer of nolibrary"):
        pipeline_structure(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "[" * 100_000, "{}", '{"_class_name": 3}', '{"_class_name": "DDPMScheduler", "vae": ["os", "system"]}', "\xff"],
)
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content, "latin-1")
    with pytest.raises(
        ec.ModelNotFoundError, match=r"model_index\.json: no pipeline can be made of it|which is not installed or has no such"
    ):
        pipeline_structure(str(tmp_path))


@pytest.mark.slow
def test_costs_are_counted_at_any_size_of_a_pipelines_folder(unet_folder):
    report = ec.cost(str(unet_folder), sizes=[(64, 96), (512, 512)])
    small, large = report.costs
    assert (small.image, large.image) == (16 * 24, 128 * 128)
    assert small.text is None
    assert large.ratio > 2
    assert report.pixels_per_token == pytest.approx(4)
    result = CliRunner().invoke(main, ["inspect", str(unet_folder), "--size", "64x96"])
    assert result.exit_code == 0, result.stderr
    assert "64 x 96" in result.stdout
