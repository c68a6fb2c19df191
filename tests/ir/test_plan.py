"""Plans as data: what they print and what they read."""

from __future__ import annotations

import pytest

import edit_compile as ec
from edit_compile.ir.plan import Given


def site(path: str, action: str) -> ec.SitePlan:
    layout = ec.TokenLayout.of(("image", "h*w"), ("text", "t"))
    return ec.SitePlan(path=path, action=action, reason="because", query_layout=layout, key_layout=layout)


def plan(*sites: ec.SitePlan) -> ec.Plan:
    return ec.Plan(model="Model", sites=sites, grid=Given(), inputs={"dict": {}})


def test_a_plan_prints_its_sites_with_their_reasons():
    lines = str(plan(site("blocks.0.attn", "mm-edit"), site("head", "keep"))).splitlines()
    assert lines[0] == "Model: 1 of 2 attention sites rewritten"
    first, second = (next(line.split() for line in lines if path in line) for path in ("blocks.0.attn", "head"))
    assert first[:2] == ["1", "blocks.0.attn"]
    assert {"mm-edit", "because"} <= set(first)
    assert "keep" in second


def test_a_plan_is_a_sequence_of_sites():
    made = plan(site("blocks.0.attn", "mm-edit"), site("head", "keep"))
    assert len(made) == 2
    assert [each.path for each in made] == ["blocks.0.attn", "head"]
    assert made["head"].action == "keep"
    assert made[-1] == made["head"]
    assert "head" in made
    assert made["head"] in made
    assert "blocks.1.attn" not in made
    with pytest.raises(KeyError, match=r"no site at 'blocks.1.attn'; near it: blocks\.0\.attn, head"):
        made["blocks.1.attn"]


def test_plans_are_hashable():
    assert len({plan(site("a", "edit")), plan(site("a", "edit")), plan(site("a", "keep"))}) == 2
    assert hash(site("a", "edit")) == hash(site("a", "edit"))


def test_a_plan_that_rewrites_a_site_twice_is_refused():
    with pytest.raises(ec.PlanError, match="the plan rewrites the site a twice"):
        ec.Plan.from_json(plan(site("a", "edit"), site("a", "edit")).to_json())


def test_json_round_trip_compares_equal():
    made = plan(site("blocks.0.attn", "mm-edit"))
    assert ec.Plan.from_json(made.to_json()) == made
    assert ec.Plan.from_json(made.to_json()) != plan(site("blocks.0.attn", "edit"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan"),
        ("{}", "not a plan: model: Field required"),
        ('{"version": 2}', "not a plan"),
        ("[1]", "not a plan"),
        ("[" * 100_000, "not a plan"),
    ],
)
def test_what_is_no_plan_is_refused(text, message):
    with pytest.raises(ec.PlanError, match=message):
        ec.Plan.from_json(text)


def test_another_version_is_named():
    with pytest.raises(ec.PlanError, match="version 7, this release reads version 2"):
        ec.Plan.from_json(plan(site("a", "keep")).model_copy(update={"version": 7}).to_json())


def test_options_that_json_has_no_number_for_come_back():
    made = plan(site("a", "edit").model_copy(update={"options": {"clip": float("inf")}}))
    assert ec.Plan.from_json(made.to_json()) == made
