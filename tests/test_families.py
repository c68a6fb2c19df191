"""Classification is structural: model families without a line of code of their own come out right."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import edit_compile as ec
from families import FAMILIES

pytestmark = pytest.mark.usefixtures("compiled_once")

ACTIONS = {
    "sd3": {"mm-edit": 3},
    "sd3-dual": {"mm-edit": 3, "edit": 2},
    "pixart": {"edit": 2, "keep": 2},
    "flux": {"mm-edit": 4},
    "dit": {"edit": 2},
    "vit": {"mm-edit": 2},
    "vit-registers": {"mm-edit": 2},
    "bria": {"mm-edit": 4},
    "chroma": {"mm-edit": 4},
    "cogview4": {"mm-edit": 2},
    "hunyuan-dit": {"edit": 4, "keep": 5},
    "aura-flow": {"mm-edit": 4},
    "lumina-next": {"edit": 2, "keep": 2},
    "wan": {"edit": 2, "keep": 2},
    "ltx": {"edit": 2, "keep": 2},
}
TEXT_FIRST = ("flux", "bria", "chroma", "cogview4")


def first_tensor(output):
    return output[0] if isinstance(output, tuple) else output


IN_EVERY_RUN = ("sd3-dual", "pixart", "flux", "dit", "vit", "wan")  # half a minute each where it is slow; all of them in `make test-all`


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in ACTIONS])
def test_family_is_planned_converted_and_run(name):
    model, inputs = FAMILIES[name]()
    plan = ec.plan(model, example_inputs=inputs)
    assert Counter(site.action for site in plan.sites) == ACTIONS[name], [f"{s.path}: {s.reason}" for s in plan.sites]
    for site in plan.rewritten:
        kinds = [segment.kind for segment in site.query_layout.segments]
        assert kinds.count("image") == 1
        if name in TEXT_FIRST:
            assert kinds == ["text", "image"]
    student = ec.linearize(model, plan=plan)
    assert isinstance(student, type(model))
    with torch.no_grad():
        expected, got = first_tensor(model(**inputs)), first_tensor(student(**inputs))
        with ec.teacher(student):
            assert torch.equal(first_tensor(student(**inputs)), expected)
    assert got.shape == expected.shape
    assert got.isfinite().all()
    assert not torch.equal(got, expected)


def test_a_family_that_stays_as_it_is_says_why():
    reason = "already linear attention"
    model, inputs = FAMILIES["sana"]()
    plan = ec.plan(model, example_inputs=inputs)
    assert not plan.rewritten
    assert any(reason in site.reason for site in plan.sites)
    assert all(site.query_layout.has(ec.TokenKind.IMAGE) for site in plan.sites)
    with pytest.raises(ec.PlanError, match=f"none of .* can be converted; the nearest is .*{reason}"):
        ec.linearize(model, example_inputs=inputs)


@pytest.mark.slow
def test_what_cannot_be_captured_names_the_line():
    model, inputs = FAMILIES["lumina2"]()
    with pytest.raises(ec.CaptureError, match=r"transformer_lumina2\.py:\d+ \(.*seq_lengths"):
        ec.plan(model, example_inputs=inputs)


def test_unknown_family_without_inputs_says_how_to_give_them():
    model, _ = FAMILIES["bria"]()
    with pytest.raises(ec.NoExampleInputsError, match=r"BriaTransformer2DModel.*example_inputs=dict.*record"):
        ec.plan(model)
