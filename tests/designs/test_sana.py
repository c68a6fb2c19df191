"""`sana` against its formula in float64, through the public face, with and without its convolution in feed-forward networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import edit_compile as ec
import small_picture
import toy
import whole_sequence
from whole_sequence import CASES, Maps, plain, relu_weight

MAPS = Maps(plain(0), plain(1), plain(2))


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str):
    whole_sequence.check("sana", {"mix_ffn": False}, CASES[case], MAPS, relu_weight)


def hand(h: int, w: int, others: int) -> int:
    """2 heads of 12 x 12 multiplications for each key and of 12 x 13 for each query; two convolutions of 3 x 3 over 48 hidden channels."""
    length = h * w + others
    return 2 * (length * 2 * 144 + length * 2 * 156 + 2 * h * w * 9 * 48)


def test_a_model_is_converted_at_the_cost_counted_by_hand():
    student = whole_sequence.check_conversion("sana", {}, hand)
    whole_sequence.check_linear(student)
    actions = {found.path: found.action for found in ec.plan_of(student)}
    assert actions == {"blocks.0.attn": "sana", "blocks.0.ff": "mix-ffn", "blocks.1.attn": "sana", "blocks.1.ff": "mix-ffn"}
    student(**toy.inputs(text=4)).square().sum().backward()
    added = {name: p.grad for name, p in student.named_parameters() if ".edit." in name}
    assert {name.split(".")[2] for name in added} == {"ff"}
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in added.values())


def test_attention_alone_adds_nothing():
    config = ec.LinearizeConfig(design="sana", mix_ffn=False)
    student = small_picture.check_converted(small_picture.Picture(), "sana", config=config)
    assert not any(".edit." in name for name in student.state_dict())


def test_a_rule_brings_the_convolution_to_the_paths_that_it_is_for():
    rules = [ec.Rule("blocks.1.*", "keep"), ec.Rule("*", "sana")]
    plan = ec.plan(toy.Toy(), ec.LinearizeConfig(rules=rules), toy.inputs())
    assert {site.path: site.action for site in plan if site.rewritten} == {"blocks.0.attn": "sana", "blocks.0.ff": "mix-ffn"}


class OneModule(small_picture.Block):
    """Attention and a feed-forward network in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(small_picture.WIDTH, 48), torch.nn.Linear(48, small_picture.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x + self.down(self.up(x).relu())


def test_a_network_in_the_module_of_rewritten_attention_is_left_unchanged():
    model = small_picture.Picture(OneModule).eval()
    plan = ec.plan(model, ec.LinearizeConfig(design="sana"), small_picture.image(*small_picture.SIZES[0]))
    found = {(site.kind, site.action, site.reason) for site in plan}
    assert found == {
        ("attention", "sana", "attention between image tokens"),
        ("feed_forward", "keep", "its module holds attention that is to be rewritten, at blocks.0"),
        ("feed_forward", "keep", "its module holds attention that is to be rewritten, at blocks.1"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mix_ffn": "maybe"}, "^mix_ffn='maybe': input should be a valid boolean"), ({"eta": 1}, "^unknown option 'eta'")],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(design="sana", **options)
