"""`linfusion` against its formula in float64, through the public face, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edit_compile as ec
import reference
import small_picture
import toy
import whole_sequence
from edit_compile.designs.linfusion import TokenMap
from reference import Array
from whole_sequence import CASES, Maps, plain


def token_map(layer: nn.Module, x: Array) -> Array:
    """X + Linear(LeakyReLU(LayerNorm(Linear(X)))), one token after the other."""
    mapped = []
    for token in x:
        hidden = reference.weight(layer.reduce) @ token + reference.weight(layer.reduce, "bias")
        mean = sum(hidden) / len(hidden)
        variance = sum((each - mean) ** 2 for each in hidden) / len(hidden)
        normed = (hidden - mean) / math.sqrt(variance + 1e-5) * reference.weight(layer.norm) + reference.weight(layer.norm, "bias")
        active = np.array([each if each > 0 else each / 100 for each in normed])
        mapped.append(token + reference.weight(layer.restore) @ active + reference.weight(layer.restore, "bias"))
    return np.array(mapped)


def elu_weight(q: Array, k: Array) -> float:
    """(ELU(q) + 1) . (ELU(k) + 1), in which ELU(x) + 1 is x + 1 above zero and exp(x) below."""

    def feature(x: float) -> float:
        return x + 1 if x > 0 else math.exp(x)

    return sum(feature(a) * feature(b) for a, b in zip(q, k, strict=True))


MAPS = Maps(
    lambda module, image, grid: reference.project(module, 0, token_map(module.edit.query, image)),
    lambda module, image, grid: reference.project(module, 1, token_map(module.edit.key, image)),
    plain(2),
)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str):
    whole_sequence.check("linfusion", {}, CASES[case], MAPS, elu_weight)


def test_reduced_it_is_the_formula():
    whole_sequence.check("linfusion", {"reduction": 4, "identity": False}, {"joint": True, "padded": True, "rope": True}, MAPS, elu_weight)


def hand(h: int, w: int, others: int) -> int:
    """Two maps of 2 * 24 * 12 multiplications a token, 2 heads of 12 x 12 for each key and each query."""
    n = h * w
    return 2 * (2 * n * (2 * 24 * 12) + (n + others) * 2 * 144 * 2)


def test_a_model_is_converted_at_the_cost_counted_by_hand():
    student = whole_sequence.check_conversion("linfusion", {"reduction": 2}, hand)
    whole_sequence.check_linear(student)
    student(**toy.inputs(text=4)).square().sum().backward()
    added = {name: p.grad for name, p in student.named_parameters() if ".edit." in name}
    assert len(added) == 2 * 12
    assert all(g is not None and g.isfinite().all() for g in added.values())
    assert all(g.abs().sum() > 0 for name, g in added.items() if ".restore." in name)


def test_a_fused_projection_is_converted():
    small_picture.check_converted(small_picture.Picture(), "linfusion", config=ec.LinearizeConfig(design="linfusion"))


def test_untrained_its_maps_add_nothing():
    x = torch.randn(2, 7, 8)
    assert torch.equal(TokenMap(8, 2)(x), x)
    assert not torch.equal(TokenMap(8, 2, identity=False)(x), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "^reduction=0: input should be greater than 0$"),
        ({"ratio": 2}, "^unknown option 'ratio'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(design="linfusion", **options)


def test_a_reduction_that_does_not_divide_is_refused_in_words():
    reasons = small_picture.reasons(small_picture.Picture(), config=ec.LinearizeConfig(design="linfusion", reduction=5))
    assert set(reasons.values()) == {"reduction=5 does not divide the 32 channels of this site"}
