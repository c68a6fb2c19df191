"""`sana` against its formula in float64, through the public face, with and without its convolution in feed-forward networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import edit_compile as ec
import small_picture
import toy
import whole_sequence
from edit_compile.passes.plan_sites import attention_beside
from whole_sequence import CASES, Maps, plain, relu_weight

MAPS = Maps(plain(0), plain(1), plain(2))


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str):
    whole_sequence.check("sana", {"mix_ffn": False}, CASES[case], MAPS, relu_weight)


def hand(h: int, w: int, others: int) -> int:
    """2 heads of 12 x 12 multiplications for each key and each query; two convolutions of 3 x 3 over 48 hidden channels."""
    length = h * w + others
    return 2 * (length * 2 * 144 * 2 + 2 * h * w * 9 * 48)


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


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        (
            [ec.Rule("*.attn", "sana")],
            {"blocks.0.attn": "sana", "blocks.0.ff": "mix-ffn", "blocks.1.attn": "sana", "blocks.1.ff": "mix-ffn"},
        ),
        ([ec.Rule("blocks.1.*", "keep"), ec.Rule("*", "sana")], {"blocks.0.attn": "sana", "blocks.0.ff": "mix-ffn"}),
        ([ec.Rule("*", "edit"), ec.Rule("*", "sana")], {"blocks.0.attn": "edit", "blocks.1.attn": "edit"}),
        (
            [ec.Rule("blocks.0.attn", "sana", {"mix_ffn": False}), ec.Rule("*", "sana")],
            {"blocks.0.attn": "sana", "blocks.1.attn": "sana", "blocks.1.ff": "mix-ffn"},
        ),
        ([ec.Rule("*.attn", "sana", companions=False)], {"blocks.0.attn": "sana", "blocks.1.attn": "sana"}),
    ],
)
def test_the_convolution_comes_to_the_networks_beside_attention_that_got_the_design(rules: list[ec.Rule], wanted: dict[str, str]):
    plan = ec.plan(toy.Toy(), ec.LinearizeConfig(rules=rules), toy.inputs())
    assert {site.path: site.action for site in plan if site.rewritten} == wanted
    missing = {"blocks.0.ff", "blocks.1.ff"} - set(wanted) if rules[-1].companions else set()
    kept = {site.path: site.reason for site in plan if not site.rewritten and site.kind == "feed_forward"}
    assert set(kept) == missing
    alone = "mix-ffn comes with sana, and no attention beside this network has got that"
    assert all(reason in (alone, "kept by the rule for 'blocks.1.*'") for reason in kept.values())


def test_what_is_left_out_beside_it_is_in_the_plan():
    config = ec.LinearizeConfig(design="sana", include=("*.attn",), mix_ffn={"identity": False})
    plan = ec.plan(toy.Toy(blocks=1), config, toy.inputs())
    assert [(site.path, site.action, site.reason) for site in plan] == [
        ("blocks.0.attn", "sana", "attention between image tokens"),
        ("blocks.0.ff", "keep", "left out by include and exclude"),
    ]


def test_it_passes_options_to_what_it_brings():
    config = ec.LinearizeConfig(design="sana", mix_ffn={"identity": False})
    assert [choice.options.model_dump() for choice in config.choices()] == [{"mix_ffn": {"identity": False}}, {"identity": False}]
    assert [choice.design.name for choice in ec.LinearizeConfig(design="sana", mix_ffn=False).choices()] == ["sana"]


def test_what_is_beside_a_network():
    attention = ["blocks.0.attn", "blocks.0.attn2", "blocks.1.attn", "attn", "layers.0", "layers.2"]
    assert attention_beside("blocks.0.ff", attention) == ("blocks.0.attn", "blocks.0.attn2")
    assert attention_beside("blocks.0.ff.net.deep", attention) == ("blocks.0.attn", "blocks.0.attn2")
    assert attention_beside("layers.1", attention) == ("layers.0", "layers.2")
    assert attention_beside("ff", attention) == ("attn",)
    assert attention_beside("blocks.2.ff", attention) == ()
    assert attention_beside("final.ff", ["blocks.0.attn"]) == ()


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
    [
        ({"mix_ffn": "maybe"}, "^mix_ffn='maybe': input should be a valid dictionary"),
        ({"mix_ffn": {"identitty": True}}, "^unknown option 'mix_ffn.identitty'$"),
        ({"eta": 1}, "^unknown option 'eta'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(design="sana", **options)
