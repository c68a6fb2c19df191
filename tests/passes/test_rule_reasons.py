"""Rules that name sites one by one: each may say why, and equal sites share what is compiled all the same."""

from __future__ import annotations

import edit_compile as ec
import toy
from edit_compile.student.site import converted_sites

TEXT = 5


def test_a_rules_reason_is_in_the_plan_and_does_not_cost_a_compilation():
    base = toy.Toy(blocks=3, joint=True).eval()
    rules = [
        ec.Rule("blocks.0.attn", "mm-edit", reason="the first"),
        ec.Rule("blocks.1.attn", "keep", reason="left out"),
        ec.Rule("blocks.2.attn", "mm-edit", reason="the last"),
    ]
    student = ec.linearize(base, ec.LinearizeConfig(rules=rules), toy.inputs(text=TEXT))
    first, kept, last = ec.plan_of(student)
    assert kept.reason == "left out"
    assert first.reason.endswith("; the first")
    assert last.reason.endswith("; the last")
    assert first.reason.removesuffix("the first") == last.reason.removesuffix("the last")
    one, other = converted_sites(student).values()
    assert type(one) is type(other)
    assert len({record.graph for record in ec.plan_of(student).passes if record.graph != "model"}) == 1
