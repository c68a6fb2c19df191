"""Losses and kinds of data from outside: registered, or named in entry points; used by name in recipes."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
import yaml

import edit_compile as ec
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import DataConfig, Recipe, distill, load_recipe, registry
from edit_compile.distillation.data import data_kinds, register_data
from edit_compile.distillation.data.registry import DATA
from edit_compile.distillation.recipe.names import find_recipe, shipped_recipes
from edit_compile.distillation.train.losses import LOSSES, Comparison, loss_names, register_loss


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch):
    for kept in (LOSSES, DATA):
        for name in ("_items", "_origins"):
            monkeypatch.setattr(kept, name, dict(getattr(kept, name)))


def huber(comparison: Comparison):
    return torch.nn.functional.huber_loss(comparison.prediction, comparison.teacher_prediction)


class Smoothness:
    """A loss as a class, which needs no teacher."""

    def compute(self, comparison: Comparison):
        return comparison.prediction.diff(dim=-1).square().mean()


class ToyData(DataConfig):
    kind: Literal["toy"]
    shift: float = 0.0
    """Added to every image."""

    def open(self, context):
        return toy_distill.ToySource(self.shift)


def run(folder, **options):
    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow")}
    common["source"] = None if "data" in options else toy_distill.ToySource()
    return distill(toy_distill.recipe(layerwise=None, **options), folder, student=toy_distill.student(), **common)


def test_losses_and_data_of_others_are_used_by_name(tmp_path):
    register_loss("huber")(huber)
    register_loss("smooth", needs_teacher=False)(Smoothness)
    register_data("toy")(ToyData)
    stage = {"resolution": [12, 16], "steps": 3, "global_batch_size": 2, "losses": {"huber": 2, "smooth": 0.1, "output": 0}}
    run(tmp_path, stages=[stage], data={"kind": "toy", "shift": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"huber", "smooth", "task", "output", "feature"} <= rows[0].keys()
    parts = 2 * rows[0]["huber"] + 0.1 * rows[0]["smooth"] + 0.5 * rows[0]["feature"]
    assert rows[0]["loss"] == pytest.approx(parts, rel=1e-5)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"] == {"kind": "toy", "shift": 0.5}


def test_no_teacher_runs_for_losses_that_need_none(tmp_path):
    register_loss("smooth", needs_teacher=False)(Smoothness)
    losses = {"smooth": 1, "output": 0, "feature": 0}
    run(tmp_path, stages=[{"resolution": [12, 16], "steps": 1, "global_batch_size": 2, "losses": losses}])
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["loss"] == row["smooth"]
    assert not {"output", "feature"} & row.keys()


def test_a_loss_that_reads_the_teacher_must_ask_for_it(tmp_path):
    register_loss("huber", needs_teacher=False)(huber)
    stage = {"resolution": [12, 16], "steps": 1, "global_batch_size": 2, "losses": {"huber": 1, "output": 0, "feature": 0}}
    with pytest.raises(ec.DistillError, match="registered with needs_teacher=False"):
        run(tmp_path, stages=[stage])


class Point:
    """An entry point of an installed package."""

    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"package:{name}", load


def broken():
    raise ImportError("no module named package")


@pytest.fixture
def installed(monkeypatch):
    points = {
        "edit_compile.losses": [Point("broken", broken), Point("huber", lambda: huber)],
        "edit_compile.data": [Point("toy", lambda: ToyData)],
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    for kept in (LOSSES, DATA):
        monkeypatch.setattr(kept, "_loaded", False)


def test_entry_points_are_found_when_they_are_needed(installed, caplog):
    content = {"model": "toy", "stages": [{"resolution": 8, "steps": 1, "losses": {"huber": 1}}], "data": {"kind": "toy", "shift": 2}}
    recipe = Recipe.model_validate(content)
    assert recipe.data == ToyData(kind="toy", shift=2)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert "huber" in loss_names()
    assert "toy" in data_kinds()
    assert "a loss 'broken' of package:broken cannot be loaded: no module named package" in caplog.text


def test_the_json_schema_has_every_kind_and_describes_every_key(installed):
    schema = Recipe.model_json_schema()
    kinds = {section["properties"]["kind"]["const"]: section for section in schema["properties"]["data"]["oneOf"]}
    from_files = {"images", "dataset", "webdataset", "prompts", "pipeline", "cached"}
    assert {"shapes", "shape-groups", "moving-shapes", "random", "toy"} | from_files == kinds.keys()
    assert kinds["toy"]["properties"]["shift"]["description"] == "Added to every image."
    own = ("Buckets", "LayerwiseFit", "LinearizeConfig", "LoraOptions", "MuonOptions", "OptimizerConfig", "Rule", "SampleGrids", "Stage")
    own += ("TimestepSampling", "ValidationConfig")
    for section in (schema, *kinds.values(), *(schema["$defs"][name] for name in own)):
        for name, field in section["properties"].items():
            assert "description" in field, name


def test_the_json_schema_takes_what_recipes_contain():
    """An editor that checks YAML by the schema must not mark what loads: designs' options beside `design`, one side of a square."""
    definitions = Recipe.model_json_schema()["$defs"]
    assert definitions["LinearizeConfig"]["additionalProperties"] is True
    one_side, both_sides = definitions["Stage"]["properties"]["resolution"]["anyOf"]
    assert one_side["type"] == "integer"
    assert both_sides["type"] == "array"
    for name in shipped_recipes():
        content = yaml.safe_load(find_recipe(name).read_text())
        assert all(isinstance(phase.get("lr", 0.0), float) for phase in (*content["stages"], content["layerwise"])), name


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ec.ConfigError, match="a loss named 'task' is already registered, by edit_compile"):
        register_loss("task")(huber)
    with pytest.raises(ec.ConfigError, match="data named 'images' is already registered"):
        register_data("images")(ToyData)
    register_loss("huber")(huber)
    register_loss("huber")(huber)  # a notebook's cell that is run twice
    with pytest.raises(ec.ConfigError, match="must be a subclass of DataConfig"):
        register_data("odd")(dict)


def test_wrong_options_of_others_data_are_named(tmp_path):
    register_data("toy")(ToyData)
    file = tmp_path / "recipe.yaml"
    file.write_text("model: demo/dit\nstages: [{resolution: 32, steps: 1}]\ndata:\n  kind: toy\n  shfit: 1")
    with pytest.raises(ec.RecipeError, match=r"recipe.yaml:5: data.shfit: unknown key; did you mean shift\? there are: kind, shift"):
        load_recipe(file)
