"""Plans as data: what they print and what they read."""

from __future__ import annotations

import pytest

import edit_compile as ec
from edit_compile.ir.plan import Given


def site(path: str, action: str) -> ec.SitePlan:
    layout = ec.TokenLayout.of(("image", "h*w"), ("text", "t"))
    return ec.SitePlan(path=path, action=action, reason="because", query_layout=layout, key_layout=layout)


def plan(*sites: ec.SitePlan) -> ec.Plan:
    return ec.Plan(model="Model", config=ec.LinearizeConfig(), sites=sites, grid=Given(), inputs={"dict": {}})


def test_a_plan_prints_every_site_with_its_reason():
    lines = str(plan(site("blocks.0.attn", "mm-edit"), site("head", "keep"))).splitlines()
    assert lines[0] == "Model: 1 of 2 attention sites rewritten"
    assert lines[1].split() == ["blocks.0.attn", "mm-edit", "[image", "h*w,", "text", "t]", "because"]
    assert lines[2].split()[:2] == ["head", "keep"]


def test_json_round_trip_compares_equal():
    made = plan(site("blocks.0.attn", "mm-edit"))
    assert ec.Plan.from_json(made.to_json()) == made
    assert ec.Plan.from_json(made.to_json()) != plan(site("blocks.0.attn", "edit"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a plan"), ("{}", "not a plan: model: Field required"), ('{"version": 2}', "not a plan")],
)
def test_what_is_no_plan_is_refused(text, message):
    with pytest.raises(ec.PlanError, match=message):
        ec.Plan.from_json(text)


def test_another_version_is_named():
    with pytest.raises(ec.PlanError, match="version 7, this release reads version 1"):
        ec.Plan.from_json(plan(site("a", "keep")).model_copy(update={"version": 7}).to_json())
