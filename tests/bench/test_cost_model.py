"""Predictions: rates that are measured once, what a forward does, and what follows of both."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_tables import shown
from torch import nn

import edit_compile as ec
from edit_compile.adapters.random_model import random_model
from edit_compile.bench import roofline as measuring
from edit_compile.bench.conversion_cost import predicted_speedups
from edit_compile.bench.prediction import Traffic, count_traffic, predict
from edit_compile.bench.roofline import Roofline, known_rates, known_roofline, roofline
from edit_compile.report.tables import cost_summary, cost_table

CPU = torch.device("cpu")
RATES = Roofline(
    device="a machine",
    threads=1,
    torch_version="2",
    dtype="float32",
    product=1e12,
    softmax=5e11,
    depthwise=1e11,
    bandwidth=1e10,
    overhead=1e-6,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and measuring that takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def once(device, dtype):
        measured.append(dtype)
        return RATES.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})

    monkeypatch.setattr(measuring, "_measured", once)
    return measured


def test_rates_are_measured_once(cache, tmp_path):
    assert known_roofline(CPU, torch.float32) is None
    assert roofline(CPU, torch.float32) == roofline(CPU, torch.float32) == known_roofline(CPU, torch.float32) == RATES
    assert roofline(CPU, torch.bfloat16).dtype == "bfloat16"
    assert cache == [torch.float32, torch.bfloat16]
    for each in (tmp_path / "edit_compile").iterdir():
        each.write_text("{")
    assert known_roofline(CPU, torch.float32) is None
    assert roofline(CPU, torch.float32) == RATES
    assert len(cache) == 3


def test_rates_that_were_measured_on_a_busy_machine_are_measured_again(cache, monkeypatch, tmp_path):
    kept = roofline(CPU, torch.float32)
    (file,) = (tmp_path / "edit_compile").iterdir()
    slow = kept.model_copy(update={"product": 1e6, "softmax": 1e6, "bandwidth": 2 * kept.bandwidth, "overhead": 1e-3})
    file.write_text(slow.model_dump_json())
    assert roofline(CPU, torch.float32) == kept.model_copy(update={"bandwidth": 2 * kept.bandwidth}) == known_roofline(CPU, torch.float32)
    assert len(cache) == 2


def test_rates_of_other_threads_are_others(cache, monkeypatch):
    roofline(CPU, torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert known_roofline(CPU, torch.float32) is None


def test_a_home_that_cannot_be_written_is_no_matter(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert roofline(CPU, torch.float32) == RATES


@pytest.mark.slow
def test_rates_are_those_of_a_machine():
    found = measuring._measured(CPU, torch.float32)
    assert 1e9 < found.product < 1e15
    assert 1e8 < found.softmax < 1e15
    assert 1e8 < found.bandwidth < 1e14
    assert 0 < found.overhead < 1e-3


def test_parts_take_what_limits_them():
    assert RATES.seconds(ec.Product(1000, 1000, 1000)) == pytest.approx(2e-3)
    assert RATES.seconds(ec.Product(1000, 1000, 30)) == pytest.approx(4e-4)  # a thousand times a thousand numbers, written
    assert RATES.seconds(ec.Product(1000, 1000, 9)) == pytest.approx(1.8e-4)  # as a depthwise convolution
    assert RATES.seconds(ec.Softmax(100, 100, 50, 50, 10)) == pytest.approx(4e-5)
    assert RATES.seconds(ec.Product(1, 1, 1)) == 1e-6


class Small(nn.Module):
    """A Linear, attention in a module of its own, a sum."""

    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    def __init__(self):
        super().__init__()
        self.linear, self.attention = nn.Linear(6, 6, bias=False), self.Attention()

    def forward(self, x):
        y = self.linear(x)[:, None]
        return self.attention(y) + y


def test_what_a_forward_does_is_counted():
    with torch.device("meta"):
        found = count_traffic(Small(), {"x": torch.empty(2, 5, 6)}, ["attention"])
        elsewhere = count_traffic(Small(), {"x": torch.empty(2, 5, 6)}, [])
    assert found.flops == 2 * 2 * 5 * 6 * 6
    assert found.bytes == 3 * 4 * 60  # of the sum
    assert found.operations == 2
    assert found.attention == {"attention": [ec.Softmax(5, 5, 6, 6, 2)]}
    assert elsewhere == dataclasses.replace(found, attention={"": found.attention["attention"]})


def test_a_prediction_replaces_attention_by_parts():
    traffic = Traffic(10**9, 10**6, 100, {"a": [ec.Softmax(1000, 1000, 50, 50)], "": [ec.Softmax(1000, 100, 50, 50)]})
    found = predict(traffic, {"a": (ec.Product(1000, 1000, 50),)}, RATES, compiled=False)
    assert found.rest == pytest.approx(1e-3 + 1e-4 + 1e-4 + 4e-5)
    assert (found.before["a"], found.after["a"]) == pytest.approx((4e-4, 4e-4))
    assert predict(traffic, {}, RATES, compiled=True).rest < found.rest


def test_costs_have_predictions_where_there_are_rates(cache):
    student = ec.linearize(random_model("demo/dit", blocks=2, device="meta").model)
    without = cost_summary(ec.cost(student, [(64, 64)], rates=known_rates()))
    assert without["rates"] is without["costs"][0]["seconds_before"] is None
    assert predicted_speedups(student) is None
    roofline(CPU, torch.float32)
    assert (predicted_speedups(student) or "").startswith("Predicted speed-up on a machine, compiled, float32: ")
    report = ec.cost(student, [(32, 32), (64, 64), (128, 128)], rates=known_rates())
    ratios = [cost.seconds_before / cost.seconds_after for cost in report.costs]
    assert ratios == sorted(ratios)
    for cost in report.costs:
        saved = sum(site.seconds_before - site.seconds_after for site in cost.sites)
        assert saved == pytest.approx(cost.seconds_before - cost.seconds_after)
    assert report.break_even_predicted is not None
    summary = json.loads(json.dumps(cost_summary(report)))
    assert summary["rates"]["product"] == 1e12
    assert summary["predicted_to_pay_from"] == report.break_even_predicted
    text = shown(cost_table(report), 100)
    assert "predicted: speed-up of a forward, compiled, float32, on a machine, 1 thread" in text
    assert f"{ratios[-1]:.2f}x" in text
