"""Studies: what is read, what is refused and in which words, and that every shipped configuration can be planned."""

from __future__ import annotations

import pytest
import torch
import yaml

import edit_compile as ec
from edit_compile.demo import models
from edit_compile.ir.tokens import TokenKind
from edit_compile.study.load import find_study, load_study, resolve, shipped_studies

IMAGE = TokenKind.IMAGE


def write(folder, **content):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"recipe": "demo-dit", "configurations": {"a": {}}} | content, sort_keys=False))
    return path


def test_changes_are_nested_or_dotted(tmp_path):
    changes = {"nested": {"convert": {"reduction": 8}, "stages": {0: {"lr": 1}}}, "dotted": {"convert.reduction": 8, "stages.0.lr": 1}}
    path = write(tmp_path, set={"ema_decay": 0.5, "convert": {}}, configurations=changes | {"bare": None})
    study = load_study(path)
    nested, dotted, bare = (resolve(study, path, name, 3) for name in ("nested", "dotted", "bare"))
    assert nested == dotted
    assert (nested.convert.options, nested.stages[0].lr, nested.ema_decay, nested.seed) == ({"reduction": 8}, 1, 0.5, 3)
    assert bare.convert.options == {}


def test_a_recipe_beside_the_study_is_found(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("model: demo/dit\nstages: [{resolution: 32, steps: 7}]\n")
    path = write(tmp_path, recipe="own.yaml")
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(load_study(path), path, "a", 0).stages[0].steps == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"sedes": [1]}, r"study\.yaml:\d+: sedes: unknown key; did you mean seeds\?"),
        ({"seeds": []}, r"study\.yaml:\d+: seeds: "),
        ({"budget": {"steps": 5, "seconds": 3}}, r"budget: give either steps or seconds"),
        ({"configurations": {"a/b": {}}}, r"configurations\.a/b: a name is made of letters"),
        ({"configurations": {"a": {}, "A": {}}}, "differ in case only"),
        ({"configurations": {"a": {"convert": {"desing": "edit"}}}}, r"configuration 'a': .*desing.*did you mean design"),
        ({"configurations": {"a": {"stages.7.lr": 1}}}, r"configuration 'a': stages\.7\.lr=1: stages has elements 0 to 0"),
        ({"configurations": {"a": {}, "b": {"model": "demo/mm-dit"}}}, "configuration 'b' is of another model, demo/mm-dit"),
        ({"recipe": "demo-dti"}, "no recipe 'demo-dti'.*did you mean demo-dit"),
        ({"untrained": ["b"]}, "no configuration is called 'b'"),
        ({"latency": {}}, r"latency\.sizes"),
        ({"measure": {"gallery": 99}}, r"measure\.gallery"),
    ],
)
def test_what_is_refused(tmp_path, content, words):
    with pytest.raises(ec.StudyError, match=words) as caught:
        load_study(write(tmp_path, **content))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_studies(tmp_path):
    with pytest.raises(ec.StudyError, match=r"no study 'designs'.*did you mean designs-"):
        find_study("designs")
    (path := tmp_path / "study.yaml").write_text("- 1\n")
    with pytest.raises(ec.StudyError, match="is not a study"):
        load_study(path)
    path.write_text("configurations: {a: {}}\n")
    with pytest.raises(ec.StudyError, match="recipe"):
        load_study(path)


def one_block(name):
    """The demo model's structure with one block, which has all its kinds of sites."""
    with torch.device("meta"):
        whole = models.untrained(name)
        return type(whole).from_config({**whole.config, "num_layers": 1})


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_read(name):
    path = find_study(name)
    study = load_study(path)
    assert study.budget.steps is not None
    recipes = [resolve(study, path, configuration, 0) for configuration in study.configurations]
    for model in {recipe.model for recipe in recipes}:
        assert (models.folder(model.removeprefix("demo/")) / "diffusion_pytorch_model.safetensors").is_file()
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(recipes)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_studies())
def test_every_configuration_of_a_shipped_study_converts(name):
    path = find_study(name)
    study = load_study(path)
    seen = {}
    for configuration in study.configurations:
        recipe = resolve(study, path, configuration, 0)
        if recipe.convert.model_dump_json() not in seen:
            plan = ec.plan(one_block(recipe.model.removeprefix("demo/")), recipe.convert)
            seen[recipe.convert.model_dump_json()] = plan
            attention = [site for site in plan.sites if site.kind == "attention"]
            between_images = [site for site in attention if site.query_layout.has(IMAGE) and site.key_layout.has(IMAGE)]
            assert plan.rewritten, f"{configuration}: {plan}"
            assert all(site.rewritten for site in between_images), f"{configuration}: {plan}"
