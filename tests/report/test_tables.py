"""What users read, at the widths of their terminals."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import edit_compile as ec
from edit_compile.bench import Cost, CostReport, SiteCost
from edit_compile.ir.plan import Given, PositionIds, SizesOfInputs
from edit_compile.ir.symbol_names import readable_names
from edit_compile.report.tables import PlanTable, cost_summary, cost_table, magnitude, plan_summary

HEIGHT, WIDTH = "(s20//2)", "(s33//2)"
PICTURE = ("image", f"({HEIGHT})*({WIDTH})")
SIZES = SizesOfInputs(expressions=(HEIGHT, WIDTH), symbols={"s20": ("hidden_states", 2), "s33": ("hidden_states", 3)})


def site(path, action="edit", reason="attention between image tokens", queries=(PICTURE,), keys=None, grid=(HEIGHT, WIDTH)):
    layout = ec.TokenLayout.of(*queries)
    return ec.SitePlan(
        path=path,
        action=action,
        reason=reason,
        query_layout=layout,
        key_layout=ec.TokenLayout.of(*keys) if keys else layout,
        grid=ec.Grid(grid) if grid else None,
    )


def plan(*sites, source=SIZES):
    return ec.Plan(model="Model", config=ec.LinearizeConfig(), sites=sites, grid=source, inputs={})


def shown(renderable, width):
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


BLOCKS = [site(f"transformer_blocks.{i}.attn1") for i in range(28)]
CROSS = [
    site(f"transformer_blocks.{i}.attn2", "keep", "cross-attention: linear in image tokens already", keys=[("text", "s31")])
    for i in range(28)
]


def test_sizes_have_readable_names():
    names = readable_names(plan(*BLOCKS, *CROSS))
    assert names.layout(BLOCKS[0].query_layout) == "image h*w"
    assert names.layout(CROSS[0].key_layout) == "text t"
    assert names.grid(BLOCKS[0].grid) == "h x w"
    assert names.meanings == {
        "h": "rows of image tokens, hidden_states.shape[2] // 2",
        "w": "columns of image tokens, hidden_states.shape[3] // 2",
        "t": "text tokens",
    }


@pytest.mark.parametrize(
    ("queries", "grid", "source", "expected"),
    [
        ([("text", "s31"), ("image", "s87")], None, PositionIds(input="img_ids"), "text t, image h*w"),
        ([("text", "s31"), ("image", "s87")], None, Given(), "text t, image n"),
        ([("other", "5"), ("image", "196")], ("14", "14"), Given(), "other 5, image 196"),
        ([("image", "s3*s7"), ("text", "s31 + s77")], ("s7", "s3"), Given(), "image h*w, text t + t2"),
        ([("image", "s2*s7*s3")], ("s2", "s7", "s3"), Given(), "image f*h*w"),
        ([("image", "(s20//2)**2")], ("s20//2", "s20//2"), Given(), "image h ** 2"),
        ([("image", "?"), ("text", "s1 + 1")], None, Given(), "image ?, text t + 1"),
    ],
)
def test_names_of_other_layouts(queries, grid, source, expected):
    odd = site("blocks.0.attn", queries=queries, grid=grid)
    assert readable_names(plan(odd, source=source)).layout(odd.query_layout) == expected


@pytest.mark.parametrize("width", [80, 120, 160])
def test_plan_is_readable_at_any_width(width):
    text = shown(PlanTable(plan(*BLOCKS, *CROSS)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "28 of 56 attention sites rewritten" in text
    assert "transformer_blocks.{0..27}.attn1" in text  # in one piece
    assert "image h*w (keys: text t)" in text
    assert "cross-attention: linear in image tokens already" in text
    assert ("reason" in text) == (width == 160)
    assert "h: rows of image tokens" in text


def test_reasons_below_the_table_are_told_apart():
    kept = [site("a", "keep", "causal attention"), site("b", "keep", "no image tokens take part")]
    text = shown(PlanTable(plan(*kept, *BLOCKS)), 60)
    assert "keep (1): causal attention" in text
    assert "keep (2): no image tokens take part" in text
    assert "edit: attention between image tokens" in text


def test_plan_summary_is_json():
    found = json.loads(json.dumps(plan_summary(plan(*BLOCKS, *CROSS))))
    assert found["actions"] == {"edit": 28, "keep": 28}
    assert found["sizes"]["t"] == "text tokens"
    assert found["sites"][28] == {
        "path": "transformer_blocks.0.attn2",
        "action": "keep",
        "reason": "cross-attention: linear in image tokens already",
        "queries": "image h*w",
        "keys": "text t",
        "grid": "h x w",
    }


def cost(side, before, after):
    return Cost(side, side, (side // 16) ** 2, 512, before, after, (SiteCost("a", before, after),))


REPORT = CostReport(
    parameters=11_901_408_320,
    added=1_348_607_232,
    costs=(cost(1024, 74_380_000_000_000, 73_890_000_000_000), cost(4096, 3_908_000_000_000_000, 1_080_000_000_000_000)),
    impossible={"8192 x 8192": "the positions [end] at 6144 px"},
    pays_from=3923,
    pixels_per_token=16,
)


@pytest.mark.parametrize("width", [80, 160])
def test_costs_say_up_front_where_nothing_is_gained(width):
    text = shown(cost_table(REPORT), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("No gain at 1024 x 1024 px (74.4 T FLOPs before, 73.9 T after).")
    assert "Break-even is near 3,923 image tokens (1,002 px square)" in " ".join(text.split())
    assert "1.35 G parameters added to 11.9 G (11.3%)" in text
    assert "4096 x 4096        65,536          512  3.91 P  1.08 P  3.62x" in text
    assert "the positions [end] at 6144 px" in text


def test_costs_that_pay_warn_of_nothing():
    paying = CostReport(10, 1, (cost(64, 200, 100),), {}, 5, 16)
    assert "No gain" not in shown(cost_table(paying), 80)


def test_cost_summary_is_json():
    found = json.loads(json.dumps(cost_summary(REPORT)))
    assert found["added"] == 1_348_607_232
    assert found["costs"][1]["ratio"] == pytest.approx(3.6185, abs=1e-4)
    assert found["costs"][0]["sites"] == [{"path": "a", "before": 74_380_000_000_000, "after": 73_890_000_000_000}]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 K"),
        (999_600, "1 M"),
        (93_598_848, "93.6 M"),
        (3_908_210_000_000_000, "3.91 P"),
        (5 * 10**18, "5e+03 P"),
    ],
)
def test_magnitudes(number, expected):
    assert magnitude(number) == expected
