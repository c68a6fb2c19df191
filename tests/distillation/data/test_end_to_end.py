"""From files to a student: `edit-compile cache`, then a distillation on the cache, with real (tiny, random) pipelines."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import data_files
import edit_compile as ec
import pipelines
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.cli import main
from edit_compile.demo import models
from edit_compile.distillation import Recipe, distill, load_recipe
from edit_compile.distillation.data import BatchRequest, open_source
from edit_compile.distillation.data.captioned_images import EncodedImages
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.sources.images import ImageFolder
from edit_compile.distillation.make_cache import make_cache
from edit_compile.files import claimed

pytestmark = pytest.mark.usefixtures("compiled_once")

DEMO = {
    "model": "demo/mm-dit",
    "stages": [{"resolution": 32, "steps": 1, "global_batch_size": 2}, {"resolution": [16, 24], "steps": 1, "global_batch_size": 2}],
}
CAPTIONS = ["a red circle", "a large blue cross", "a zebra", "a green square", "a small cyan triangle", "a white background"]


@pytest.fixture
def recipe(tmp_path):
    """A recipe's file: the demo model on a folder of images, one of whose captions it does not know."""
    folder = data_files.folder_of(tmp_path / "images", [(32, 32)] * 6)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number:03d}.txt").write_text(caption)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(DEMO | {"data": {"kind": "images", "path": str(folder)}}))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["cache", *map(str, arguments)])


def test_the_command_makes_continues_and_verifies_a_cache(recipe, tmp_path):
    made = run(recipe, "-o", tmp_path / "cache", "--shard-size", 2, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert (found["samples"], found["shards"], found["resolutions"]) == (5, 3, ["32x32", "16x24"])
    assert "002.png: its caption cannot be encoded: this demo model does not know ['zebra']" in made.stderr
    again = run(recipe, "-o", tmp_path / "cache", "--shard-size", 2)
    assert again.exit_code == 0
    assert "5 samples at 32x32, 16x24 px in 3 shards" in again.stdout
    assert run(recipe, "-o", tmp_path / "cache", "--verify").exit_code == 0
    (tmp_path / "cache" / "shard-00002.safetensors").write_bytes(b"damaged")
    verified = run(recipe, "-o", tmp_path / "cache", "--verify")
    assert verified.exit_code == 1
    assert "damaged" in verified.stderr
    assert "error: 2 of 5 samples in" in verified.stderr


def test_two_commands_do_not_make_one_cache(recipe, tmp_path):
    with claimed(tmp_path / "cache" / ".lock"):
        second = run(recipe, "-o", tmp_path / "cache")
    assert second.exit_code == 1
    assert "another process makes a cache in" in second.stderr
    assert not (tmp_path / "cache").exists()


def test_a_cache_gives_the_demo_model_what_the_images_give(recipe, tmp_path):
    make_cache(load_recipe(recipe, ["data.buckets=null"]), tmp_path / "cache")
    data = load_recipe(recipe, ["data={kind: cached, path: " + str(tmp_path / "cache") + ", caption_dropout: 0}"]).data
    model = models.untrained("mm-dit")
    batch = open_source(data, model, 0, base="demo/mm-dit").batch(BatchRequest(0, 2, range(2), 16, 24))
    for caption, image in zip(batch.captions, batch.latents, strict=True):
        expected = data_files.image(CAPTIONS.index(caption), 32, 32).resize((24, 24)).crop((0, 4, 24, 20))
        found = ((image.permute(1, 2, 0) + 1) * 127.5).round()
        assert (found - torch.from_numpy(np.array(expected))).abs().max() <= 3
    conditions = models.conditions(model, batch.captions)
    for name, value in conditions.items():
        assert torch.equal(batch.conditions[name], value)


def test_data_that_need_no_cache_say_so(tmp_path):
    result = run("demo-mm-dit", "-o", tmp_path / "cache")
    assert result.exit_code == 1
    assert "data.kind: shapes needs no cache: it can be trained on as it is" in result.stderr


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # trained norms are in float32: right, but not fused
@pytest.mark.parametrize("name", pipelines.PIPELINES)
@pytest.mark.parametrize(
    ("kind", "precision"), [("images", "fp32"), pytest.param("prompts", "fp32", marks=pytest.mark.slow), ("prompts", "bf16")]
)
def test_a_pipeline_is_distilled_on_a_cache(tmp_path, name, kind, precision):
    pipelines.PIPELINES[name]().save_pretrained(tmp_path / "pipeline")
    if kind == "images":
        data = {"path": str(data_files.folder_of(tmp_path / "images", [(48, 48), (32, 64)] * 4)), "buckets": {"multiple": 16}}
    else:
        (tmp_path / "prompts.txt").write_text("a red cat\na dog\nblue\n")
        data = {"path": str(tmp_path / "prompts.txt"), "steps": 2}
    stage = {"resolution": 48, "steps": 2, "global_batch_size": 2}
    common = {
        "model": str(tmp_path / "pipeline"),
        "stages": [stage],
        "validation": {"samples": 2, "batch_size": 2, "timestep_bins": 1},
        "log_every": 1,
    }
    common |= {"precision": precision, "trackers": []}
    made = make_cache(Recipe.model_validate(common | {"data": {"kind": kind, **data}}), tmp_path / "cache")
    assert made.samples == (8 if kind == "images" else 3)
    if (kind == "images") != (name == "sd3"):
        return  # a distillation takes long: one a family
    common |= {"data": {"kind": "cached", "path": str(tmp_path / "cache")}}
    if name != "sd3":  # the transformer alone: its latents cannot be shown
        common |= {"model": str(tmp_path / "pipeline" / "transformer"), "prediction": "epsilon"}
    result = distill(Recipe.model_validate(common), tmp_path / "out")
    assert 0 < result.after.total < float("inf")
    assert (tmp_path / "out" / "result.json").is_file()
    assert (tmp_path / "out" / "samples").exists() == (name == "sd3")


def test_what_was_skipped_is_counted_and_named_at_the_end(tmp_path, caplog):
    source = toy_distill.ToySource()
    source.skipped = {"a.png": "its image cannot be read"}
    recipe, flow = toy_distill.recipe(layerwise=None), NoiseSchedule("rectified-flow")
    distill(recipe, tmp_path, student=toy_distill.student(), source=source, denoise=toy_distill.denoise, schedule=flow)
    assert json.loads((tmp_path / "unreadable.json").read_text()) == source.skipped
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["unreadable"] for row in rows} == {1}
    assert f"1 sample could not be read: see {tmp_path / 'unreadable.json'}" in caplog.text


def test_the_command_says_what_is_in_the_data(recipe, tmp_path):
    changes = ["stages.0.steps=1", "stages.1.steps=1", "validation={samples: 4, batch_size: 4, timestep_bins: 1}"]
    options = [part for change in changes for part in ("--set", change)]
    result = CliRunner().invoke(main, ["distill", str(recipe), "-o", str(tmp_path / "run"), *options])
    assert result.exit_code == 0, result.output
    assert "data: 6 found, 5 to train on (32 x 32: 5 px), 1 held out, 0 skipped" in result.stderr
    assert "on 4 samples of 1 held-out images" in result.stdout


class Pixels(data_files.Letters):
    """An encoder for the toy model, which takes pixels."""

    def encode_captions(self, captions):
        return {"text": torch.zeros(len(captions), toy_distill.TEXT, 6)}

    def encode_images(self, images):
        return images

    def decode(self, latents):
        return latents / 2 + 0.5


def test_a_run_goes_on_with_changed_data_only_if_told_to(tmp_path):
    folder = data_files.folder_of(tmp_path / "images", [(12, 16)] * 9)
    content = {"data": {"kind": "images", "path": str(folder), "held_out": 2, "buckets": None}, "save_every": 1, "log_every": 1}
    content |= {"stages": [{"resolution": [12, 16], "steps": 3, "global_batch_size": 2}], "layerwise": None}
    recipe = toy_distill.recipe(**content, validation={"samples": 2, "batch_size": 2, "timestep_bins": 1})

    def continued(report=None, **options):
        encoded = EncodedImages(ImageFolder(folder, None, {}), Pixels(), None)
        options |= {"source": MapStyleSource(encoded, 0, 2), "denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow")}
        return distill(recipe, tmp_path / "run", student=toy_distill.student(), report=report, **options)

    def stop(row):
        if row["total"] == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(ec.Interrupted):
        continued(stop)
    held_out = json.loads((tmp_path / "run" / "data.json").read_text())["held_out"]
    data_files.folder_of(folder / "added", [(12, 16)])
    with pytest.raises(ec.DistillError, match=r"run: the data have changed since the run began .* --accept-changed-data"):
        continued(resume=True)
    result = continued(resume=True, accept_changed_data=True)
    assert json.loads((tmp_path / "run" / "data.json").read_text())["held_out"] == held_out
    assert (result.data.found, result.data.held_out) == (10, 2)
