"""Equal budgets: steps in proportion, and times that become steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edit_compile as ec
from edit_compile.distillation import Recipe
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.study import budget
from edit_compile.study.budget import StepTiming, apportioned, as_cell, with_seconds, with_steps

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
    with pytest.raises(ec.StudyError, match="1 cannot be shared by 2 phases"):
        with_steps(recipe(), 1)
    longer = with_steps(recipe(), 22_500)
    assert longer.layerwise.steps == 9_000
    assert longer.layerwise.warmup_steps == 50
    assert as_cell(longer).save_every == recipe().save_every
    assert as_cell(recipe(trackers=["tensorboard"])).trackers == ("tensorboard",)
    assert as_cell(recipe()).trackers == ()


def test_seconds_become_steps_by_what_steps_take():
    timing = StepTiming(recipe={}, machine="this", seconds_per_step=(0.01, 0.03))
    found = with_seconds(recipe(), 30.0, timing)
    steps = [phase.options.steps for phase in phases_of(found)]
    assert steps == [545, 818]
    assert abs(steps[0] * 0.01 + steps[1] * 0.03 - 30) < 0.1


class Runs(list):
    busy = 1.0


@pytest.fixture
def runs(monkeypatch):
    """Short runs of steps that take a thousandth of `reduction` seconds, times how busy the machine is."""
    done = Runs()

    def run(one):
        reduction = one.convert.options["reduction"]
        done.append(reduction)
        if reduction == 16:
            raise RuntimeError("no memory")
        return [
            {"phase": phase.name, "step": step, "seconds_per_step": 0.001 * reduction * done.busy}
            for phase in phases_of(one)
            for step in range(1, 7)
        ]

    monkeypatch.setattr(budget, "_short_run", run)
    return done


def of(*reductions):
    return {f"r{reduction}": recipe(convert={"reduction": reduction}) for reduction in reductions}


def test_short_runs_are_by_turns_and_remembered(tmp_path, runs):
    first = budget.timings(of(2, 4), tmp_path, "this")
    assert runs == [2, 4, 2, 4]
    assert budget.timings(of(2, 4), tmp_path, "this") == first
    assert budget.timings({"r2": recipe(convert={"reduction": 2}, seed=3)}, tmp_path, "this").found["r2"] == first.found["r2"]
    assert len(runs) == 4


def test_what_comes_later_is_timed_beside_what_was_there(tmp_path, runs):
    first = budget.timings(of(2, 4), tmp_path, "this").found
    runs.clear()
    runs.busy = 3.0
    found = budget.timings(of(2, 4, 8), tmp_path, "this").found
    assert runs == [2, 8, 2, 8]
    assert {name: timing for name, timing in found.items() if name != "r8"} == first
    assert found["r8"].seconds_per_step == pytest.approx((0.008, 0.008))
    with pytest.raises(ec.StudyError, match=r"'r3' cannot be timed on this machine \(that\): the others were on another \(this\)"):
        budget.timings(of(2, 3), tmp_path, "that")


def test_a_short_run_that_fails_fails_its_configuration_alone(tmp_path, runs):
    found = budget.timings(of(16, 4), tmp_path, "this")
    assert (list(found.found), str(found.failed["r16"])) == (["r4"], "no memory")
    assert runs == [16, 4, 4]


def test_a_short_run_visits_all_of_a_samplers_timesteps(monkeypatch):
    short = []
    monkeypatch.setattr(budget, "distill", lambda one, *args, **options: short.append(one))
    budget._short_run(recipe(timesteps={"sampler_steps": 9}, validation={"resolutions": [64]}))
    assert (short[0].validation.samples, short[0].validation.resolutions) == (9, ())
    monkeypatch.setattr(budget, "distill", stopped)
    with pytest.raises(ec.Interrupted, match=r"^stopped while the steps of the configurations were timed$"):
        budget.timings(of(2), Path("nowhere"), "this")


def stopped(*args, **options):
    raise ec.Interrupted("saved in a folder that is gone")
