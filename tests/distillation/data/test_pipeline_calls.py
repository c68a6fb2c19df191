"""Distilling a model that no adapter knows on the calls that its own pipeline makes: here Stable Diffusion's UNet."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from click.testing import CliRunner

import edit_compile as ec
from edit_compile.adapters.pipeline_calls import CallRecorder, merged
from edit_compile.cli import main
from edit_compile.distillation.data import BatchRequest, SourceContext
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.sources.pipeline import PipelineData
from pipelines import unet_pipeline

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    unet_pipeline().save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(f"prompt {letter}" for letter in "abcd"))
    return folder


def data(folder, **options):
    options = {"call": {"num_inference_steps": STEPS, "guidance_scale": 2.0}, "together": 2, **options}
    return PipelineData(kind="pipeline", path=folder / "prompts.txt", **options)


def opened(folder, **options):
    model = ec.linearize(str(folder))
    return data(folder, **options).open(SourceContext(model, 0, str(folder), torch.device("cpu"), torch.float32))


def test_calls_are_those_of_the_original_pipeline(folder):
    pipe, source = unet_pipeline(), opened(folder)
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    recorder = CallRecorder(str(folder), pipe.unet, torch.device("cpu"), torch.float32, options)
    expected = recorder.calls("prompt a", 64, 96, seed_of(0, "validation", 0))
    assert len(expected) == STEPS
    request = BatchRequest(0, 1, range(1), 64, 96, "validation")
    for call, timestep in zip(expected, (999.0, 500.0, 1.0), strict=True):
        found = source.recorded(request, torch.tensor([timestep])).arguments
        assert found.keys() == call.keys()
        assert torch.equal(found["sample"], call["sample"])
        assert torch.equal(found["encoder_hidden_states"], call["encoder_hidden_states"])
        assert found["timestep"] == call["timestep"]


@pytest.mark.slow
def test_a_call_depends_on_its_position_and_timestep_alone(folder):
    source, times = opened(folder), torch.tensor([100.0])
    request = BatchRequest(0, 1, range(1), 64, 96)
    before = source.recorded(request, times).arguments["sample"]
    for position in range(1, 4 * 2 * STEPS, STEPS):
        source.recorded(BatchRequest(position, 1, range(1), 64, 96), times)
    assert len(source.kept["train"]) <= 2
    assert torch.equal(source.recorded(request, times).arguments["sample"], before)


def test_batches_are_joined_or_refused(folder):
    source = opened(folder)
    with pytest.raises(ec.DistillError, match="set micro_batch_size: 1"):  # Stable Diffusion takes one timestep for all
        source.recorded(BatchRequest(0, 2, range(2), 64, 96), torch.tensor([100.0, 900.0]))
    same = source.recorded(BatchRequest(0, 2, range(2), 64, 96), torch.tensor([900.0, 900.0])).arguments
    assert same["sample"].shape[0] == 4  # each with and without its prompt
    a = {"x": torch.ones(2, 3, 4), "ids": torch.zeros(5, 2), "n": 3}
    assert merged([a, a])["x"].shape == (4, 3, 4)
    with pytest.raises(ec.DistillError, match="differ in size"):
        merged([a, {**a, "n": 4}])


@pytest.mark.slow
def test_distil_from_the_command_line(folder, tmp_path):
    recipe = {
        "model": str(folder),
        "data": json.loads(data(folder).model_dump_json()),
        "layerwise": {"steps": 1, "global_batch_size": 1},
        "stages": [
            {"resolution": [64, 96], "steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "losses": {"output": 1, "feature": 1}}
        ],
        "validation": {"samples": 4, "batch_size": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(main, ["distill", str(path), "-o", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.stderr
    errors = json.loads(result.stdout)["held_out_error"]
    assert 0 < errors["after"]["total"] < 10
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "task" not in row
    assert row["output"] > 0
    assert ec.load(tmp_path / "run").state_dict()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"call": {"colour": 3}}}, ec.DistillError, "StableDiffusionPipeline does not take colour"),
        ({"data": {"held_out": 4}}, ec.DistillError, "none is left to train on"),
        ({"stages": {"losses": {"task": 1}}}, ec.RecipeError, r"stages.0.losses.task: data of kind pipeline has no clean images"),
    ],
)
def test_what_cannot_be_is_said_at_once(folder, tmp_path, changes, error, message):
    stage = {"resolution": [64, 96], "steps": 1, "global_batch_size": 1, **changes.get("stages", {})}
    recipe = {
        "model": str(folder),
        "data": json.loads(data(folder).model_dump_json()) | changes.get("data", {}),
        "stages": [stage],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(error, match=message):
        ec.distill(tmp_path / "recipe.yaml", tmp_path / "run")
