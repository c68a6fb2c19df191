"""Attention arithmetic in half precision and at the ends of a type's range: as near to float64 as softmax attention's own kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edit_compile.designs import find_design
from edit_compile.designs.base import QKV, Tokens
from edit_compile.designs.ops import local_attention
from edit_compile.designs.ops.feature_maps import elu_plus_one
from edit_compile.designs.ops.linear_attention import attention_with_normaliser, linear_attention, softmax_with_normaliser
from edit_compile.designs.ops.local_attention import Window, attention_in_blocks
from edit_compile.ir.site import Site
from edit_compile.ir.tokens import TokenLayout

HALVES = [torch.bfloat16, torch.float16]
GRID, TEXT, CHANNELS, HEADS = (12, 17), 9, 32, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "mm-edit": {"key": "plain", "value": "plain"},
    "linear-mm-alpha": {"key": "plain", "value": "plain"},
    "sana": {},
    "linfusion": {},
    "kv-compress": {},
    "clear": {"radius": 4},
    "local-linear": {"radius": 3},
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)).item()


def sequence(design: str) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    """A design of a joint site, and a call of it on operands behind no taps."""
    n = math.prod(GRID)
    layout = TokenLayout.of(("image", n), ("text", TEXT))
    places = {f"{side}_{name}": HEADS * CHANNELS for side in ("before", "after") for name in ("query", "key", "value")}
    site = Site("attention", "a", layout, layout, 2, places, heads=HEADS, key_heads=HEADS, head_dim=CHANNELS, value_dim=CHANNELS)
    module = find_design(design)(site, find_design(design).Options(**OPTIONS[design]))
    module.stride = ()  # the operands are not compressed

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return module(QKV(q, k, v, mask, QKV(q, k, v, mask)), Tokens(("image", "text"), (n, TEXT), GRID))

    return module, call


def operands(offset: float = 0.0, seed: int = 0, length: int = math.prod(GRID) + TEXT) -> list[Tensor]:
    q, k, v = (random(1, HEADS, length, CHANNELS, seed=seed + i) for i in range(3))
    return [2 * q + 1, k + offset, v]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0, 2, 5, 20])
def test_keys_with_a_mean_cost_no_precision(offset: float, dtype: torch.dtype):
    """Scores rounded to half precision would be wrong by a share of their size, which grows with the offset of keys."""
    half = [x.to(dtype) for x in operands(offset, length=math.prod(GRID))]
    exact = [x.double() for x in half]
    kernel = error(F.scaled_dot_product_attention(*half), F.scaled_dot_product_attention(*exact))
    scale = CHANNELS**-0.5
    for attend in (
        lambda q, k, v: attention_with_normaliser(q, k[:, :, :77], v[:, :, :77], None, scale),
        lambda q, k, v: attention_in_blocks(q, k, v, GRID, Window(6), scale),
    ):
        (y, normaliser), (wanted, log_total) = attend(*half), attend(*exact)
        assert y.dtype == dtype
        assert error(y, wanted) < 2 * kernel
        torch.testing.assert_close(normaliser.double(), log_total, atol=1e-4, rtol=0)
        y, normaliser = attend(half[0].clone().requires_grad_(), *half[1:])  # the form that has gradients
        assert error(y.detach(), wanted) < 2 * kernel
        torch.testing.assert_close(normaliser.detach().double(), log_total, atol=1e-4, rtol=0)
        with torch.autocast("cpu", dtype):
            y, normaliser = attend(*(x.float() for x in half))
        assert error(y, wanted) < 2 * kernel
        torch.testing.assert_close(normaliser.double(), log_total, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("design", "times"), [("clear", 2), ("local-linear", 2), ("mm-edit", 4), ("kv-compress", 2)])
@torch.no_grad()
def test_designs_with_softmax_are_about_as_precise_as_its_kernel(design: str, times: float, dtype: torch.dtype):
    module, call = sequence(design)
    for offset in (0, 5, 20):
        half = [x.to(dtype) for x in operands(offset)]
        exact = [x.double() for x in half]
        kernel = error(F.scaled_dot_product_attention(*half), F.scaled_dot_product_attention(*exact))
        module.double()
        wanted = call(*exact)
        module.to(dtype)
        assert error(call(*half), wanted) < times * kernel


EXTREMES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "outlier channels": lambda q, k, v: (outlier(q, 3, 200), outlier(k, 3, 1000), outlier(v, 5, 1000)),
    "outliers in different channels": lambda q, k, v: (outlier(q, 3, 1000), outlier(k, 4, 1000), v),
    "large": lambda q, k, v: (60 * q, 60 * k, 200 + v),
    "small": lambda q, k, v: (1e-4 * q, 1e-4 * k, v),
    "constant": lambda q, k, v: (torch.ones_like(q), torch.ones_like(k), torch.full_like(v, 150)),
    "zero": lambda q, k, v: (0 * q, 0 * k, v),
}


def outlier(x: Tensor, channel: int, factor: float) -> Tensor:
    return x * torch.where(torch.arange(x.shape[-1]) == channel, factor, 1)


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("design", OPTIONS)
def test_in_float16_nothing_is_lost_where_softmax_attention_loses_nothing(design: str, case: str):
    """Outputs near float64's, however the operands are scaled, and finite gradients."""
    module, call = sequence(design)
    half = [x.half() for x in EXTREMES[case](*operands())]
    assert F.scaled_dot_product_attention(*half).isfinite().all()
    module.double()
    with torch.no_grad():
        wanted = call(*(x.double() for x in half))
    module.half()
    given = [x.requires_grad_() for x in half]
    found = call(*given)
    assert error(found.detach(), wanted) < 0.02
    gradients = torch.autograd.grad(found.float().mean(), [*given, *module.parameters()], allow_unused=True)
    assert all(x.isfinite().all() for x in gradients if x is not None)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted down": lambda bias: bias - 30,
    "shifted up": lambda bias: bias + 100,
    "shifted out of range of its exponential": lambda bias: bias + 3e4,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("shift", MASKS)
@pytest.mark.parametrize("design", OPTIONS)
@torch.no_grad()
def test_a_bias_of_all_keys_alike_changes_nothing(design: str, shift: str, dtype: torch.dtype):
    module, call = sequence(design)
    module.to(dtype)
    given = [x.to(dtype) for x in operands()]
    bias = torch.where(torch.arange(math.prod(GRID) + TEXT) % 3 == 0, -2.0, 0.0)[None, None, None].to(dtype)
    wanted, found = call(*given, bias), call(*given, MASKS[shift](bias))
    tolerance = {torch.float64: 1e-8, torch.float32: 3e-2, torch.float16: math.inf}[dtype]  # a shift leaves less room for the scores
    assert found.isfinite().all()
    assert error(found, wanted.double()) < tolerance


@pytest.mark.parametrize("masked", ["all", "text", "image"])
@pytest.mark.parametrize("kind", ["boolean", "infinite", "lowest"])
@pytest.mark.parametrize("design", OPTIONS)
def test_keys_that_are_all_masked_leave_everything_finite(design: str, kind: str, masked: str):
    module, call = sequence(design)
    module.half()
    n = math.prod(GRID)
    counts = torch.tensor([masked == "text"] * n + [masked == "image"] * TEXT)[None, None, None]
    lowest = {"boolean": None, "infinite": -math.inf, "lowest": torch.finfo(torch.float16).min}[kind]
    mask = counts if lowest is None else torch.where(counts, 0.0, lowest).half().requires_grad_()
    given = [x.half().requires_grad_() for x in operands()]
    found = call(*given, mask)
    assert found.isfinite().all()
    given += [mask] if mask.requires_grad else []
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.float().square().mean(), given))


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_attention_over_many_keys_stays_in_range(dtype: torch.dtype):
    q, k, v = (8 * (random(1, 1, length, 32, seed=seed).relu() + 0.05) for seed, length in enumerate((4, 65_536, 65_536)))
    full, _ = linear_attention(q, k, v)
    half, _ = linear_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    torch.testing.assert_close(half.double(), full, rtol=2e-2, atol=0)


def test_the_scale_of_queries_and_keys_has_no_effect_on_linear_attention():
    q, k, v = (random(1, 2, 64, 16, seed=seed).relu() for seed in range(3))
    wanted, normaliser = linear_attention(q, k, v)
    for scale in (1e-4, 1e-12, 1e8):
        scaled = [(scale * x).float().requires_grad_() for x in (q, k)]
        found, scaled_normaliser = linear_attention(*scaled, v.float())
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(scaled_normaliser.double() - 2 * math.log(scale), normaliser, atol=1e-4, rtol=0)
        assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), scaled))


def test_in_parts_the_blocks_are_what_they_are_at_once(monkeypatch: pytest.MonkeyPatch):
    """With their gradients, and with no more scores in memory than allowed."""
    given = [x.requires_grad_() for x in operands(length=math.prod(GRID))]
    mask = torch.where(torch.arange(math.prod(GRID)) % 4 == 0, -1.0, 0.5)[None, None, None].double()

    def results() -> list[Tensor]:
        y, normaliser = attention_in_blocks(*given, GRID, Window(3), 0.3, mask)
        return [y, normaliser, *torch.autograd.grad(y.square().sum() + normaliser.sin().sum(), given)]

    wanted = results()
    most = HEADS * 64 * Window(3).keys * 2
    monkeypatch.setattr(local_attention, "MOST_SCORES", most)
    largest: list[int] = []
    monkeypatch.setattr(local_attention, "exact_scores", lambda q, k, scale: largest.append(q.shape[2]) or _scores(q, k, scale))
    found = results()
    assert set(largest) == {2}
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


_scores = local_attention.exact_scores


def test_values_that_fit_float16_stay_finite_however_many_keys_share_a_query():
    scores, values = torch.zeros(1, 1, 3, 512), torch.full((1, 1, 512, 4), 150.0, dtype=torch.float16)
    y, log_normaliser = softmax_with_normaliser(scores, values)
    torch.testing.assert_close(y, torch.full((1, 1, 3, 4), 150.0, dtype=torch.float16), atol=0.2, rtol=0)
    torch.testing.assert_close(log_normaliser, torch.full((1, 1, 3, 1), 512.0).log())


def test_elu_plus_one_keeps_its_relative_precision_far_below_zero():
    x = torch.tensor([-20.0, -8.0, -6.0, -0.5, 0.0, 0.5, 3.0], requires_grad=True)
    wanted = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    torch.testing.assert_close(elu_plus_one(x.bfloat16()).float(), wanted, atol=0, rtol=2**-7)
    torch.testing.assert_close(elu_plus_one(x.double()), (torch.nn.functional.elu(x.double()) + 1), atol=1e-12, rtol=1e-7)
    (gradient,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    torch.testing.assert_close(gradient, torch.where(x > 0, 1.0, x.exp()).detach())
