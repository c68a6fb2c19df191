"""`clear` against its formula in float64, through the public face, and what the audit holds it to."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import edit_compile as ec
import toy
import whole_sequence
from edit_compile.designs import register, unregister
from edit_compile.designs.base import QKV, Tokens
from edit_compile.designs.clear import Clear
from edit_compile.ir.site import Site
from toy_clip import Clip, clip
from window_case import GRIDS, Case, Grid


@settings(max_examples=25, deadline=None)
@given(
    radius=st.integers(1, 9),
    frames=st.integers(1, 3),
    grids=st.sampled_from(GRIDS),
    before=st.integers(0, 2),
    after=st.integers(0, 5),
    joint=st.booleans(),
    mask=st.sampled_from(["none", "boolean", "additive"]),
)
def test_it_is_the_formula(radius: int, frames: int, grids: tuple[Grid, ...], before: int, after: int, joint: bool, mask: str):
    case = Case("clear", {"radius": radius, "frames": frames}, grids, before, after, joint, mask)
    weights = case.weights()
    total = weights.sum(-1, keepdim=True)
    wanted = torch.where(total > 0, weights @ case.values() / total, 0)
    found = case.design(case.x, case.tokens)
    counts = (total > 0).expand_as(found)  # of other queries without any key nothing is said
    torch.testing.assert_close(found[counts], wanted[counts], atol=1e-12, rtol=0)


WHOLE: dict[str, dict[str, Any]] = {
    "image": {"fused": True, "qk_norm": True, "rope": True},
    "text": {"joint": True, "text_first": True, "padded": True, "additive": True, "registers": 3, "heads": 4, "key_heads": 2, "rope": True},
    "video and text": {"video": True, "joint": True},
}


@functools.cache
def teacher(case: str) -> tuple[nn.Module, bool, bool]:
    options = dict(WHOLE[case])
    video, padded = options.pop("video", False), options.pop("padded", False)
    torch.manual_seed(0)
    return toy.shaken((Clip(**options) if video else toy.Toy(24, blocks=1, **options)).eval()), video, padded


def call(case: str, grid: Grid) -> dict[str, Tensor]:
    _, video, padded = teacher(case)
    joint = WHOLE[case].get("joint", False)
    return clip(grid, joint) if video else toy.inputs(2, 2 * grid[0], 2 * grid[1], 5 if joint else None, padded=padded)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["clear", "local-linear"])
@pytest.mark.parametrize("case", WHOLE)
@torch.no_grad()
def test_a_window_that_holds_the_image_is_the_teachers_attention(case: str, design: str):
    """With what the model does to queries and keys before: RoPE, norms, groups of heads, registers, padding."""
    model, video, _ = teacher(case)
    grids: tuple[Grid, ...] = ((3, 4, 6), (3, 5, 3)) if video else ((10, 9), (4, 3))
    config = ec.LinearizeConfig(rules=[ec.Rule("*attn", design, {"radius": 14, "frames": 9})])
    student = ec.linearize(model, config, call(case, grids[0]))
    assert ec.plan_of(student).rewritten
    for grid in grids:
        torch.testing.assert_close(student(**call(case, grid)), model(**call(case, grid)), atol=1e-5, rtol=1e-5)


class Masked(toy.Toy):
    """Has a mask (L, L), with equal rows."""

    def mask(self, text_mask: Tensor, image: Tensor) -> Tensor:
        row = super().mask(text_mask, image)[0, 0, 0]
        return row.expand(len(row), -1)


@torch.no_grad()
def test_a_mask_may_have_fewer_than_four_dimensions():
    model, given = Masked(24, blocks=1, joint=True).eval(), toy.inputs(2, 10, 14, 5, padded=True)
    student = ec.linearize(model, ec.LinearizeConfig(design="local-linear", radius=20), given)
    torch.testing.assert_close(student(**given), model(**given), atol=1e-5, rtol=0)


def hand(h: int, w: int, others: int) -> int:
    """Blocks of 64 queries against 10 x 10 keys; all with the other keys; other queries with all: 2 * 24 multiplications a pair."""
    pairs = math.ceil(h / 8) * math.ceil(w / 8) * 64 * 100 + h * w * others + others * (h * w + others)
    return 2 * 2 * 24 * pairs


def test_a_model_is_converted_at_the_cost_counted_by_hand():
    student = whole_sequence.check_conversion("clear", {"radius": 2}, hand)
    whole_sequence.check_linear(student)
    assert not [name for name, _ in student.named_parameters() if ".edit." in name]
    student(**toy.inputs(text=4)).square().sum().backward()
    projections = [p for name, p in student.named_parameters() if ".attn.to_" in name]
    assert len(projections) == 2 * 8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projections)


class AllPairs(Clear):
    """Says that it looks at windows, and looks at everything."""

    name = "all-pairs"

    def among_image_tokens(self, x: QKV, tokens: Tokens) -> tuple[Tensor, Tensor]:
        y = F.scaled_dot_product_attention(x.query, x.key, x.value, scale=self.scale)
        return y, torch.zeros_like(y[..., :1], dtype=torch.float32)


class MaskedPairs(Clear):
    """Computes all scores and then masks those outside of windows."""

    name = "masked-pairs"

    def among_image_tokens(self, x: QKV, tokens: Tokens) -> tuple[Tensor, Tensor]:
        scores = x.query @ x.key.mT
        return scores.softmax(-1) @ x.value, scores.logsumexp(-1, keepdim=True)


class Wide(Clear):
    """Looks at a wider window than it says."""

    name = "wide"

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.window = self.window._replace(radius=options.radius + 1)


class ByLinear(Clear):
    """Computes all scores with the keys as the weights of a linear layer."""

    name = "by-linear"

    def among_image_tokens(self, x: QKV, tokens: Tokens) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.query[0, 0], x.key[0, 0])[None, None]
        return F.linear(scores.softmax(-1)[0, 0], x.value[0, 0].mT).expand_as(x.value), scores.logsumexp(-1, keepdim=True)


class ByConvolution(Clear):
    """Computes all scores with the keys as the kernels of a convolution."""

    name = "by-convolution"

    def among_image_tokens(self, x: QKV, tokens: Tokens) -> tuple[Tensor, Tensor]:
        scores = F.conv1d(x.query[0, :1].mT, x.key[0, 0, :, :, None])
        return scores.mean() * x.value, scores[:, None].sum(2).unsqueeze(-1)


SMALL, LARGE = (10, 14), (18, 26)  # 5 x 7 tokens are within any window of the paper's radius


@pytest.mark.parametrize(
    ("design", "radius", "size"),
    [
        (AllPairs, 3, LARGE),
        (AllPairs, 8, SMALL),
        (MaskedPairs, 3, LARGE),
        (Wide, 3, LARGE),
        (ByLinear, 8, SMALL),
        (ByConvolution, 3, LARGE),
    ],
)
def test_a_mistake_is_found_by_the_audit(design: type[Clear], radius: int, size: tuple[int, int]):
    register(design)
    try:
        with pytest.raises(ec.AuditError, match=f"the design '{design.name}' is not what it says: .* multiplies [0-9]+ image tokens by"):
            ec.linearize(toy.Toy(blocks=1), ec.LinearizeConfig(design=design.name, radius=radius), toy.inputs(2, *size))
    finally:
        unregister(design.name)


def test_it_answers_for_blocks_and_their_surroundings():
    options = Clear.Options(radius=3, frames=2)
    assert Clear.allows(64, 144, (40, 40), options)
    assert not Clear.allows(64, 145, (40, 40), options)
    assert Clear.allows(3 * 144, 64, (5, 40, 40), options)
    assert not Clear.allows(65, 65, (40, 40), options)
    assert Clear.allows(1600, 1, (40, 40), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "^radius=0: input should be greater than 0$"),
        ({"radius": 2.5}, "^radius=2.5: input should be a valid integer"),
        ({"frames": 0}, "^frames=0: input should be greater than 0$"),
        ({"reduction": 2}, "^unknown option 'reduction'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(design="clear", **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clear", "local-linear"])
@pytest.mark.parametrize("model", ["demo/dit", "demo/mm-dit", "demo/video-dit"])
def test_the_trained_demo_models_pass_the_audit(model: str, name: str):
    student = ec.linearize(model, ec.LinearizeConfig(design=name, radius=3))
    assert ec.audit(student).findings == ()
