"""Studies: what is read, what is refused and in which words, and that every shipped configuration can be planned."""

from __future__ import annotations

import pytest
import yaml

import edit_compile as ec
from edit_compile.distillation.models import make_student
from edit_compile.study.load import find_study, load_study, resolve, shipped_studies

SMALL = {"demo/dit-64": "demo/dit", "demo/mm-dit-64": "demo/mm-dit"}


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
        ({"configurations": {"a": {"convert": {"desing": "edit"}}}}, r"configuration 'a': .*desing.*did you mean 'design'"),
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


@pytest.mark.parametrize("name", shipped_studies())
def test_every_configuration_of_a_shipped_study_converts(name):
    """On the 32 px demo of the same family, which has the same kinds of sites."""
    path = find_study(name)
    study = load_study(path)
    seen = {}
    for configuration in study.configurations:
        recipe = resolve(study, path, configuration, 0)
        key = recipe.convert.model_dump_json()
        if key not in seen:
            small = recipe.model_copy(update={"model": SMALL[recipe.model]})
            seen[key] = ec.plan_of(make_student(small, structure_only=True).model)
        assert seen[key].rewritten, configuration
