"""Equal budgets: steps in proportion, and times that become steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edit_compile.distillation import Recipe
from edit_compile.distillation.recipe.schedule import phases_of, total_steps
from edit_compile.study import budget
from edit_compile.study.budget import Timing, apportioned, as_cell, with_seconds, with_steps

STAGE = {"resolution": 32, "steps": 1350, "global_batch_size": 8, "warmup_steps": 50}


def recipe(**options):
    common = {"model": "demo/dit", "layerwise": {"steps": 900, "warmup_steps": 50}, "stages": [STAGE]}
    return Recipe.model_validate(common | options)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 2000))
def test_a_total_is_apportioned(steps, spare):
    total = len(steps) + spare
    counts = apportioned([count / sum(steps) for count in steps], total)
    assert sum(counts) == total
    assert min(counts) >= 1
    for count, own in zip(counts, steps, strict=True):
        exact = own / sum(steps) * total
        assert count == 1 or count <= exact + 1


def test_steps_replace_those_of_all_phases_in_proportion():
    found = with_steps(recipe(), 150)
    assert [phase.options.steps for phase in phases_of(found)] == [60, 90]
    assert [phase.options.warmup_steps for phase in phases_of(found)] == [12, 18]
    assert as_cell(found).save_every == 15
    assert with_steps(recipe(layerwise=None), 150).stages[0].steps == 150
    assert total_steps(with_steps(recipe(), 1)) == 2
    longer = with_steps(recipe(), 22_500)
    assert longer.layerwise.steps == 9_000
    assert longer.layerwise.warmup_steps == 50
    assert as_cell(longer).save_every == recipe().save_every
    assert as_cell(recipe(trackers=["tensorboard"])).trackers == ("tensorboard",)
    assert as_cell(recipe()).trackers == ()


def test_seconds_become_steps_by_what_steps_take():
    timing = Timing(recipe={}, seconds_per_step=(0.01, 0.03))
    found = with_seconds(recipe(), 30.0, timing)
    steps = [phase.options.steps for phase in phases_of(found)]
    assert steps == [545, 818]
    assert abs(steps[0] * 0.01 + steps[1] * 0.03 - 30) < 0.1


def test_short_runs_are_by_turns_and_remembered(tmp_path, monkeypatch):
    runs = []

    def run(one):
        runs.append(one.convert.options["reduction"])
        slow = 0.001 * one.convert.options["reduction"] * len(runs)
        return [{"phase": phase.name, "step": step, "seconds_per_step": slow * step} for phase in phases_of(one) for step in range(1, 7)]

    monkeypatch.setattr(budget, "_short_run", run)
    recipes = {f"r{reduction}": recipe(convert={"reduction": reduction}) for reduction in (2, 4)}
    first = budget.timings(recipes, tmp_path)
    assert runs == [2, 4, 2, 4]
    assert budget.timings(recipes, tmp_path) == first
    assert budget.timings({"r2": recipe(convert={"reduction": 2}, seed=3)}, tmp_path)["r2"] == first["r2"]
    assert len(runs) == 4
    budget.timings({"r2": recipe(convert={"reduction": 8})}, tmp_path)
    assert runs[4:] == [8, 8]
