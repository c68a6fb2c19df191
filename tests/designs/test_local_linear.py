"""`local-linear` against its formula in float64, through the public face, and how near its teacher it starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import edit_compile as ec
import toy
import whole_sequence
from edit_compile.designs import find_design
from edit_compile.designs.base import QKV, Tokens
from edit_compile.designs.local_linear import attention_by_moments
from edit_compile.ir.tokens import TokenLayout
from window_case import GRIDS, HEADS, KEY_HEADS, SIZE, Case, Grid, sees, site


def far(case: Case) -> tuple[Tensor, Tensor]:
    """Z (B, H, n, 1) and r (B, H, n, E) of the image tokens' queries, from sums over pairs of image tokens."""
    own = slice(case.first_query, case.first_query + case.n), slice(case.start, case.start + case.n)
    q, k, v = case.x.query[:, :, own[0]], case.keys()[:, :, own[1]], case.values()[:, :, own[1]]
    mask = torch.ones(1, 1, 1, case.n).double() if case.x.mask is None else case.x.mask[..., own[1]]
    weight = mask.double() if mask.dtype == torch.bool or case.x.mask is None else mask.exp()
    unseen = torch.tensor([[not sees(case.options, case.grids, i, j) for j in range(case.n)] for i in range(case.n)])
    share = weight / weight.sum(-1, keepdim=True).clamp(min=1e-9)  # (B, 1, 1, n)
    mean_k, mean_v = (share @ each for each in (k, v))
    d = q @ (k - mean_k).mT / math.sqrt(SIZE)  # of every pair
    second = 1 + (share * d**2).sum(-1, keepdim=True) / 2
    r = mean_v + (share * d) @ (v - mean_v) / second
    return (weight * unseen).sum(-1, keepdim=True) * (q @ mean_k.mT / math.sqrt(SIZE)).exp() * second, r


@settings(max_examples=15, deadline=None)
@given(
    radius=st.integers(1, 4),
    frames=st.integers(1, 2),
    grids=st.sampled_from(GRIDS),
    before=st.integers(0, 2),
    after=st.integers(0, 3),
    joint=st.booleans(),
    mask=st.sampled_from(["none", "boolean", "additive"]),
)
def test_it_is_the_formula(radius: int, frames: int, grids: tuple[Grid, ...], before: int, after: int, joint: bool, mask: str):
    case = Case("local-linear", {"radius": radius, "frames": frames}, grids, before, after, joint, mask)
    with torch.no_grad():
        case.design.log_weight += torch.linspace(-1, 1, HEADS, dtype=torch.float64).view(-1, 1, 1)
        found = case.design(case.x, case.tokens)
    weights = case.weights()
    total, wanted = weights.sum(-1, keepdim=True), weights @ case.values()
    z, r = far(case)
    z = z * case.design.log_weight.detach().exp()
    image = slice(case.first_query, case.first_query + case.n)
    total[:, :, image] += z
    wanted[:, :, image] += z * r
    counts = (total > 0).expand_as(found)
    torch.testing.assert_close(found[counts], (wanted / total)[counts], atol=1e-10, rtol=0)


def hand(h: int, w: int, others: int) -> int:
    """Of CLEAR, with a radius of 2; and, for 2 heads of 12: 12 x 24 for a key and for a query."""
    pairs = math.ceil(h / 8) * math.ceil(w / 8) * 64 * 100 + h * w * others + others * (h * w + others)
    return 2 * (2 * 24 * pairs + 2 * h * w * 12 * 24 * 2)


def test_a_model_is_converted_at_the_cost_counted_by_hand():
    student = whole_sequence.check_conversion("local-linear", {"radius": 2}, hand)
    whole_sequence.check_linear(student)
    student(**toy.inputs(text=4)).square().sum().backward()
    added = {name: p for name, p in student.named_parameters() if ".edit." in name}
    assert [p.shape for p in added.values()] == [(2, 1, 1)] * 2
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in added.values())


def start(design: str, radius: int, x: QKV, grid: Grid) -> Tensor:
    layout = TokenLayout.of(("image", math.prod(grid)))
    made = find_design(design)(site(layout, layout, len(grid)), find_design(design).Options(radius=radius))
    with torch.no_grad():
        found: Tensor = made(x, Tokens(("image",), (math.prod(grid),), grid))
    return found


def test_untrained_it_is_far_nearer_to_softmax_attention_than_its_window_alone():
    """Keys and values that are related, as a model's are, and a field that is smooth over the image."""
    torch.manual_seed(0)
    grid = (16, 16)
    coarse = torch.randn(2, 2 * SIZE, 5, 5)
    smooth = torch.nn.functional.interpolate(coarse, grid, mode="bicubic").flatten(2).mT[:, None]
    k, v = (smooth + 0.3 * torch.randn_like(smooth)).split(SIZE, -1)
    v = v + k
    q = 1.5 * torch.randn(2, HEADS, 256, SIZE)
    x = QKV(q, k.expand(-1, KEY_HEADS, -1, -1), v.expand(-1, KEY_HEADS, -1, -1))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
    errors = [(start(design, 4, x, grid) - wanted).square().mean() / wanted.var() for design in ("clear", "local-linear")]
    assert errors[1] < errors[0] / 3


def test_what_stands_for_the_rest_is_exact_to_second_order():
    """Where scores are small, and where they all are equal."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    for small in (1e-3, 0.0):
        scores = small * q @ k.mT
        y, log_mean = attention_by_moments(QKV(small * q, k, v), 1.0)
        torch.testing.assert_close(log_mean, scores.exp().mean(-1, keepdim=True).log(), atol=1e-6, rtol=0)
        torch.testing.assert_close(y, scores.softmax(-1) @ v, atol=1e-5, rtol=0)


def test_however_large_the_scores_the_rest_is_among_the_values():
    """Within a standard deviation over the root of two of their mean, in every direction."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 80, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    for scale in (0.1, 1.0, 10.0, 1e4):
        y, log_mean = attention_by_moments(QKV(q, k, v), scale)
        assert log_mean.isfinite().all()
        assert ((y - v.mean(2, keepdim=True)).abs() <= v.std(2, keepdim=True, correction=0) / math.sqrt(2) + 1e-9).all()


def test_images_of_one_sequence_see_each_other_by_linear_attention():
    case = Case("local-linear", {"radius": 9}, ((4, 3), (2, 5)), 0, 0, True, "none")
    other = case.x._replace(value=torch.cat([case.x.value[:, :, :12], -case.x.value[:, :, 12:]], 2))
    with torch.no_grad():
        first, second = case.design(case.x, case.tokens), case.design(other, case.tokens)
    assert ((first - second)[:, :, :12].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": -1}, "^radius=-1: input should be greater than 0$"),
        ({"identity": True}, "^unknown option 'identity'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(design="local-linear", **options)
