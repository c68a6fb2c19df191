"""`linear-mm-alpha` against its formula in float64, through the public face, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

import edit_compile as ec
import reference
import small_picture
import toy
import whole_sequence
from whole_sequence import CASES, Maps, plain, relu_weight

JOINT = [name for name, options in CASES.items() if options.get("joint")]


def maps(temporal: str = "none") -> Maps:
    return Maps(
        lambda module, image, grid: reference.project(module, 0, reference.conv_fusion(module.edit.query, image, grid, temporal)),
        lambda module, image, grid: reference.compressor(module.edit.key, reference.project(module, 1, image), grid, temporal, 1),
        lambda module, image, grid: reference.compressor(module.edit.value, reference.project(module, 2, image), grid, temporal, 1),
    )


@pytest.mark.parametrize("case", JOINT)
def test_it_is_the_formula(case: str):
    temporal = "causal" if "video" in case else "none"
    whole_sequence.check("linear-mm-alpha", {"temporal": temporal}, CASES[case], maps(temporal), relu_weight, stride=2, balanced=True)


def test_without_balance_it_is_the_formula():
    whole_sequence.check("linear-mm-alpha", {"balance": False}, {"joint": True, "padded": True}, maps(), relu_weight, stride=2)


def test_without_compression_it_is_the_formula():
    config = {"key": "plain", "value": "plain", "reduction": 2}
    fusion = Maps(maps().query, plain(1), plain(2))
    whole_sequence.check("linear-mm-alpha", config, {"joint": True, "padded": True, "rope": True}, fusion, relu_weight)


def hand(h: int, w: int, others: int) -> int:
    """ConvFusion: 10 * 24 * 6 multiplications a token; compressors: 9 * 24; 2 heads of 12 x 12 for a key and for a query."""
    n, m = h * w, math.ceil(h / 2) * math.ceil(w / 2)
    return 2 * (n * 10 * 24 * 6 + 2 * m * 9 * 24 + (m + others) * 2 * 144 + (n + others) * 2 * 144)


def test_a_model_is_converted_at_the_cost_counted_by_hand():
    student = whole_sequence.check_conversion("linear-mm-alpha", {}, hand)
    whole_sequence.check_linear(student)
    student(**toy.inputs(text=4)).square().sum().backward()
    added = {name: p.grad for name, p in student.named_parameters() if ".edit." in name}
    assert len(added) == 2 * 10
    assert all(g is not None and g.isfinite().all() for g in added.values())


def test_attention_between_image_tokens_alone_is_left_to_others():
    reasons = small_picture.reasons(small_picture.Picture(), config=ec.LinearizeConfig(design="linear-mm-alpha"))
    assert set(reasons.values()) == {"it is for joint attention of image tokens and others"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "plain"}, "^key='plain' and value='compressor': compress both or neither, keys and values are paired$"),
        ({"reduction": -1}, "^reduction=-1: input should be greater than 0$"),
        ({"eta": "ratio"}, "^unknown option 'eta'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(design="linear-mm-alpha", **options)
