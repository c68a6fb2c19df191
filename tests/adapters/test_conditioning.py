"""Models that are given an image besides captions are not distilled on captions alone."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import edit_compile as ec
from edit_compile.adapters import load_model as models
from edit_compile.adapters.conditioning import image_condition
from edit_compile.adapters.load_model import LoadedModel, load_model
from edit_compile.adapters.model_names import architectures
from edit_compile.cli import main
from edit_compile.distillation import Recipe
from edit_compile.distillation.models import load_original, make_student


def config_of(name):
    return json.loads((models.ARCHITECTURES / f"{name}.json").read_text())


@pytest.mark.parametrize("name", architectures())
def test_what_is_made_from_captions_or_classes_is_given_no_image(name):
    assert image_condition(load_model(f"arch/{name}")) is None


@pytest.mark.parametrize(
    ("name", "channels", "given"),
    [("flux-dev", 384, 320), ("flux-dev", 128, 64), ("sd3.5-medium", 33, 17), ("qwen-image", 128, 64), ("wan2.1-t2v-14b", 36, 20)],
)
def test_channels_that_are_not_predicted_are_an_image(name, channels, given, tmp_path):
    """Of FLUX Fill and Control, SD3 inpainting, Qwen-Image's control, Wan's image-to-video."""
    model = type(load_model(f"arch/{name}").model)
    config = config_of(name)
    config |= {"in_channels": channels, "out_channels": config.get("out_channels") or config["in_channels"]}
    with torch.device("meta"):
        changed = model.from_config(config)
    assert image_condition(LoadedModel(changed, name)) == f"{model.__name__} takes {given} channels of an image besides its noisy latents"


@pytest.mark.parametrize(
    ("pipeline", "condition"),
    [
        ("FluxKontextPipeline", "FluxKontextPipeline takes image besides captions"),
        ("FluxFillPipeline", "FluxFillPipeline takes image and mask_image besides captions"),
        ("QwenImageEditPipeline", "QwenImageEditPipeline takes image besides captions"),
        ("StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetPipeline takes control_image besides captions"),
        ("FluxPipeline", None),
        ("StableDiffusion3Pipeline", None),
        ("PixArtSigmaPipeline", None),
        ("WanPipeline", None),
        ("Flux2Pipeline", None),
        ("SomethingElse", None),
    ],
)
def test_a_pipeline_that_takes_images_is_told_by_its_call(pipeline, condition, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert image_condition(LoadedModel(torch.nn.Linear(1, 1), str(tmp_path), str(tmp_path))) == condition


@pytest.fixture
def fill(tmp_path):
    """The configuration of a small FLUX that is given half of its channels."""
    small = {"num_layers": 1, "num_single_layers": 1, "in_channels": 96, "out_channels": 64}
    (tmp_path / "config.json").write_text(json.dumps(config_of("flux-dev") | small))
    return tmp_path / "config.json"


@pytest.mark.parametrize("make", [make_student, load_original])
def test_distilling_and_caching_refuse_before_weights_are_loaded(make, fill):
    recipe = {"model": str(fill.parent), "data": {"kind": "images", "path": str(fill.parent)}, "stages": [{"resolution": 64, "steps": 1}]}
    with pytest.raises(
        ec.DistillError, match=r"takes 32 channels of an image .* which data: \{kind: images\} does not have: use data: \{kind: pip"
    ):
        make(Recipe.model_validate(recipe))


def test_a_dry_run_refuses_in_one_line(fill, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {fill}\nprediction: rectified-flow\ndata: {{kind: random}}\nstages: [{{resolution: 64, steps: 1}}]\n")
    result = CliRunner().invoke(main, ["distill", str(recipe), "--dry-run"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "takes 32 channels of an image" in result.stderr
