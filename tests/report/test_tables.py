"""What users read of costs and speed, at the widths of their terminals, and as JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from edit_compile.bench import Cost, CostReport, SiteCost
from edit_compile.ir.plan import Plan, Refusal, SitePlan, SizesOfInputs
from edit_compile.ir.tokens import Grid, TokenLayout
from edit_compile.report.evaluation_table import evaluation_table
from edit_compile.report.folded_table import FoldedTable
from edit_compile.report.tables import cost_summary, cost_table, format_si, plan_summary


def shown(renderable, width):
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_plan_summary_is_json():
    image, text = TokenLayout.of(("image", "s2*s3")), TokenLayout.of(("text", "s5"))
    common = {"query_layout": image, "grid": Grid(("s2", "s3"))}
    refusal = Refusal(reason="cross-attention", node="softmax", source="model.py:3 (y)")
    sites = (
        SitePlan(path="a", action="edit", options={"reduction": 4}, reason="attention between image tokens", key_layout=image, **common),
        SitePlan(path="b", action="keep", reason="cross-attention", key_layout=text, refusal=refusal, **common),
        SitePlan(path="c", action="keep", kind="feed_forward", reason="no rule is for it", key_layout=image, **common),
    )
    plan = Plan(
        model="Model", sites=sites, grid=SizesOfInputs(expressions=("s2", "s3"), symbols={"s2": ("x", 2), "s3": ("x", 3)}), inputs={}
    )
    found = json.loads(json.dumps(plan_summary(plan)))
    assert found["actions"] == {"edit": 1, "keep": 1}
    assert found["sizes"]["t"] == "text tokens"
    assert found["sites"] == [
        {
            "path": "a",
            "kind": "attention",
            "action": "edit",
            "options": {"reduction": 4},
            "reason": "attention between image tokens",
            "refusal": None,
            "queries": "image h*w",
            "keys": "image h*w",
            "grid": "h x w",
        },
        {
            "path": "b",
            "kind": "attention",
            "action": "keep",
            "options": {},
            "reason": "cross-attention",
            "refusal": {"reason": "cross-attention", "node": "softmax", "source": "model.py:3 (y)"},
            "queries": "image h*w",
            "keys": "text t",
            "grid": "h x w",
        },
    ]


def cost(side, before, after):
    return Cost(side, side, (side // 16) ** 2, 512, before, after, (SiteCost("a", before, after),))


REPORT = CostReport(
    parameters=11_901_408_320,
    added=1_348_607_232,
    costs=(cost(1024, 74_380_000_000_000, 73_890_000_000_000), cost(4096, 3_908_000_000_000_000, 1_080_000_000_000_000)),
    errors={"8192 x 8192": "the positions [end] at 6144 px"},
    break_even_tokens=3923,
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


def test_tables_keep_their_numbers_whole_at_any_width():
    table = FoldedTable(("", "image tokens", "FLOPs before", "FLOPs after"), [("1024 x 1024", "4,096", "3.91 P", "1.08 P")])
    assert shown(table, 60).splitlines()[:2] == [
        "             image tokens  FLOPs before  FLOPs after",
        "1024 x 1024         4,096        3.91 P       1.08 P",
    ]
    narrow = shown(table, 32)
    assert max(map(len, narrow.splitlines())) <= 32
    assert [line.split() for line in narrow.splitlines() if "1024" in line] == [
        ["1024", "x", "1024", "4,096", "3.91", "P"],
        ["1024", "x", "1024", "1.08", "P"],
    ]


def test_an_evaluation_fits_into_80_columns():
    network = "openai/clip-vit-large-patch14, projected embeddings of images"
    common = {"network": network, "resize": "bicubic to 224 px", "libraries": {"torchmetrics": "1.8.2"}}
    result = {
        "model": "distilled",
        "samples": 5000,
        "height": 1024,
        "width": 1024,
        "seeds": (0, 4999),
        "sampling": {"steps": None, "guidance": 5.0, "dtype": "bfloat16"},
        "real": None,
        "metrics": [
            {"name": "fid-clip", "teacher": None, "student": 12.34567, "better": "lower", "against": "the teacher's images", **common},
            {
                "name": "lpips",
                "teacher": None,
                "student": 0.1,
                "better": "lower",
                "against": "the teacher's image of the same noise",
                **common,
            },
        ],
    }
    lines = shown(evaluation_table(result), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:5] == ["fid-clip", "12.35", "lower", "the", "teacher's"] for line in lines)
    assert " ".join(lines).count("torchmetrics 1.8.2") == 1


def test_cost_summary_is_json():
    found = json.loads(json.dumps(cost_summary(REPORT)))
    assert found["added"] == 1_348_607_232
    assert found["costs"][1]["ratio"] == pytest.approx(3.6185, abs=1e-4)
    assert found["pays_from"] == 3923
    assert found["impossible"] == {"8192 x 8192": "the positions [end] at 6144 px"}
    flops = {"path": "a", "before": 74_380_000_000_000, "after": 73_890_000_000_000}
    assert found["costs"][0]["sites"] == [{**flops, "seconds_before": None, "seconds_after": None}]
    assert found["rates"] is found["predicted_to_pay_from"] is None


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
def test_si_prefixes(number, expected):
    assert format_si(number) == expected
