"""Recipes: what is wrong is named with its key and its line."""

from __future__ import annotations

import itertools
import math
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edit_compile as ec
from edit_compile.distillation import Recipe, load_recipe, shipped_recipes

MINIMAL = """\
model: demo/mm-dit
stages:
  - resolution: 32
    steps: 10
  - resolution: [32, 48]
    steps: 20
    losses: {task: 1}
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.stages


def test_a_recipe_survives_its_own_dump(file):
    recipe = load_recipe(file(MINIMAL))
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe
    assert [stage.resolution for stage in recipe.stages] == [(32, 32), (32, 48)]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("model:", "modle:", 1, "modle: unknown key; did you mean model? there are: model, convert, train"),
        ("stages:", "stage:", 2, "stage: unknown key; did you mean stages? there are: model, convert"),
        ("    steps: 20", "    steps: 20\n    warm_up: 2", 7, "stages.1.warm_up: unknown key; did you mean warmup_steps? there are: "),
        (
            "    steps: 20",
            "    step: 20",
            6,
            "stages.1.step: unknown key; did you mean steps? there are: resolution, frames, steps, global_batch_size",
        ),
        ("{task: 1}", "{tusk: 1}", 7, "stages.1.losses.tusk: unknown loss; did you mean task? there are: task, output, feature"),
        ("steps: 10", "steps: many", 4, "stages.0.steps: 'many': Input should be a valid integer"),
        ("steps: 10", "steps: 0", 4, "stages.0.steps: 0: Input should be greater than 0"),
        ("resolution: 32\n", "resolution: -32\n", 3, "stages.0.resolution.0: -32"),
        ("{task: 1}", "{task: 0, output: 0, feature: 0}", 7, "stages.1.losses: all losses are switched off"),
        ("model: demo/mm-dit", "model: demo/mm-dit\nconvert: {eta: best}", 2, "convert: eta='best': input should be 'ratio'"),
        (
            "model: demo/mm-dit",
            "model: demo/mm-dit\ndata: {kind: pictures}",
            2,
            "data.kind: 'pictures': unknown kind of data; there are: ",
        ),
        ("model: demo/mm-dit", "model: demo/mm-dit\ndata: {path: pictures}", 2, "data.kind: Field required"),
        ("model: demo/mm-dit", "model: demo/mm-dit\ndata:\n  kind: images", 2, "data.path: Field required"),
        (
            "model: demo/mm-dit",
            "model: demo/mm-dit\ndata:\n  kind: cached\n  path: x\n  bucket: 1",
            5,
            "data.bucket: unknown key; there are: kind, path,",
        ),
        (
            "model: demo/mm-dit",
            "model: demo/mm-dit\ndata:\n  kind: dataset\n  path: x\n  buckets:\n    max_ratio: 0.5",
            6,
            "data.buckets.max_ratio: 0.5: Input should be greater than or equal to 1",
        ),
        (
            "    steps: 10",
            "    steps: 10\n    global_batch_size: 4\n    micro_batch_size: 3",
            3,
            "stages.0: global_batch_size 4 is not divisible by micro_batch_size 3",
        ),
        ("    steps: 10", "    steps: 10\n    steps: 11", 5, "stages.0.steps is given twice, first in line 4"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(file, old, new, line, message):
    assert old in MINIMAL
    path = file(MINIMAL.replace(old, new, 1))
    with pytest.raises(ec.RecipeError) as caught:
        load_recipe(path)
    assert f"{path}:{line}: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a recipe"),
        ("- 1", "is not a recipe"),
        ("a: [", "is not valid YAML"),
        ("seed: 2001-13-45", "cannot be read: month must be"),
        ("model: demo/mm-dit", "stages: Field required"),
    ],
)
def test_what_is_no_recipe_says_so(file, text, message):
    with pytest.raises(ec.RecipeError, match=message):
        load_recipe(file(text))


def test_no_file_lists_the_shipped_ones():
    with pytest.raises(ec.RecipeError, match=r"neither a file nor one of the shipped ones; there are: .*demo-mm-dit"):
        load_recipe("nowhere")
    with pytest.raises(ec.RecipeError, match=r"shipped ones; did you mean demo-mm-dit\? there are: demo-dit, "):
        load_recipe("demo-mmdit")


@given(steps=st.integers(1, 10**9), lr=st.floats(1e-9, 1), number=st.integers(0, 0))
def test_overrides_reach_their_place_and_nothing_else(steps, lr, number):
    plain = load_recipe("demo-mm-dit")
    changed = load_recipe("demo-mm-dit", [f"stages.{number}.steps={steps}", f"stages.{number}.lr={lr!r}", "layerwise=null"])
    stage = plain.stages[number].model_copy(update={"steps": steps, "lr": lr})
    assert changed == plain.model_copy(update={"stages": (stage,), "layerwise": None})


def test_an_override_makes_sections_that_the_file_lacks(file):
    assert load_recipe(file(MINIMAL), ["stages.0.losses.task=2", "layerwise.steps=3"]).stages[0].losses["task"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "write KEY=VALUE"),
        ("stages.2.steps=1", "stages has elements 0 to 1, not 2"),
        ("stages.first.steps=1", "stages has elements 0 to 1, not 'first'"),
        ("model.name=1", "model is a value, model.name cannot be inside it"),
        ("stages.0.steps=many", "--set stages.0.steps=many: stages.0.steps: 'many'"),
        ("sede=1", "--set sede=1: sede: unknown key"),
        ("seed=[", "the value is not valid YAML"),
        ("seed=!!bool foo", "--set seed=!!bool foo: the value cannot be read: KeyError"),
        ("convert={1: 2}", "convert: 1 is not the name of an option"),
        ("convert={ranking: 5}", "convert: ranking: 5 is not the path of a ranking"),
        ("convert.ranking=", "convert: ranking: None is not the path of a ranking"),
        (("data", {"kind": "images", "path=x": 1}), "path=x: unknown key"),
        (("seed", date(2026, 1, 1)), "seed=2026-01-01: seed: Input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(file, override, message):
    with pytest.raises(ec.RecipeError) as caught:
        load_recipe(file(MINIMAL), [override])
    assert message in str(caught.value)


ODD = (
    None,
    True,
    -1,
    math.inf,
    "x",
    [[]],
    {1: 2},
    {"a": {}},
    {None: 1},
    {"kind": []},
    {"design": 3},
    {"ranking": {}},
    date(2026, 1, 1),
    b"x",
)


def test_whatever_a_value_is_the_error_is_a_recipes_in_one_line():
    keys = {"convert", "data", "stages", "stages.0", "optimizer.muon", "timesteps", "lora", "1", "a.b", *Recipe.model_fields}
    said = []
    for key, value in itertools.product(sorted(keys), ODD):
        try:
            load_recipe("demo-dit", [(key, value)])
        except ec.RecipeError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not any("\n" in line for line in said)
