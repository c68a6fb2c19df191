"""From how many image tokens on a student runs as converted: counted, and measured."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import edit_compile as ec
from edit_compile.adapters.inputs import inputs_for_size, pixels_per_token
from edit_compile.bench import SpeedRow, Timing, min_tokens
from edit_compile.bench.min_tokens import smallest_side
from families import FAMILIES


@functools.cache
def student() -> nn.Module:
    model, example = FAMILIES["pixart"]()
    return ec.linearize(model, example_inputs=example)


def is_converted_at(side: int) -> bool:
    model, pixels = student(), side * pixels_per_token(student())
    inputs = inputs_for_size(model, pixels, pixels, device="cpu", dtype=torch.float32).inputs
    with torch.no_grad():
        found = model(**inputs)[0]
        with ec.teacher(model):
            return not torch.equal(found, model(**inputs)[0])


def test_predicted_it_is_by_the_machines_rates_or_where_both_need_the_same_flops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(min_tokens, "known_roofline", lambda device, dtype: None)
    tokens = ec.set_min_tokens(student(), "predicted")
    assert tokens == ec.plan_of(student()).min_tokens == ec.cost(student()).break_even_tokens > 0
    side = int(tokens**0.5)
    assert [is_converted_at(side - 1), is_converted_at(side + 1)] == [False, True]
    monkeypatch.setattr(min_tokens, "known_roofline", lambda device, dtype: "rates")
    for predicted in (70, None):
        report = SimpleNamespace(break_even_tokens=50, break_even_predicted=predicted)
        monkeypatch.setattr(
            min_tokens, "cost", lambda model, pipeline, rates, report=report: report if (pipeline, rates) == ("p", "rates") else 0
        )
        with nullcontext() if predicted else pytest.raises(ec.EditCompileError, match="no size is known"):
            assert ec.set_min_tokens(student(), "predicted", pipeline="p") == 70
        assert ec.plan_of(student()).min_tokens == 70


def test_measured_it_is_the_smallest_size_at_which_the_student_is_no_slower(monkeypatch: pytest.MonkeyPatch):
    step, timed = pixels_per_token(student()), []

    def compare(model: nn.Module, sizes, **options) -> list[SpeedRow]:
        assert ec.plan_of(model).min_tokens == 0
        ((height, width),) = sizes
        timed.append(height // step)
        speedup = Timing(*[height / (11 * step)] * 3)
        return [SpeedRow(height, width, Timing(1, 1, 1), Timing(1, 1, 1), speedup)]

    monkeypatch.setattr(min_tokens, "compare_speed", compare)
    assert ec.set_min_tokens(student(), "measured") == ec.plan_of(student()).min_tokens == 11**2
    assert len(timed) == len(set(timed))
    monkeypatch.setattr(min_tokens, "compare_speed", lambda *args, **options: _refuse())
    with pytest.raises(ec.EditCompileError, match="no faster at any size that it can be measured at: too large"):
        ec.set_min_tokens(student(), "measured")
    assert ec.plan_of(student()).min_tokens == 11**2


def test_measuring_ends_at_a_size_that_takes_seconds(monkeypatch: pytest.MonkeyPatch):
    def compare(model: nn.Module, sizes, **options) -> list[SpeedRow]:
        ((height, width),) = sizes
        seconds = Timing(*[height / 500] * 3)
        return [SpeedRow(height, width, seconds, seconds, Timing(0.9, 0.9, 0.9))]

    monkeypatch.setattr(min_tokens, "compare_speed", compare)
    with pytest.raises(ec.EditCompileError, match=r"still the slower one at \d+ x \d+ px: give a number"):
        ec.set_min_tokens(student(), "measured")


def _refuse() -> None:
    raise ec.GridError("too large")


@pytest.mark.parametrize("true", [2, 4, 5, 17, 44, 45, 100, 777])
def test_the_search_times_few_sizes(true: int):
    seen: list[int] = []
    found = smallest_side(lambda side: seen.append(side) or side >= true, 44)
    assert max(4, true) <= found <= max(4, true) * 17 / 16
    assert len(seen) == len(set(seen)) <= 11
