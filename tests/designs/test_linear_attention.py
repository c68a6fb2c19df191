"""Linear attention against the formula, written as loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_compile.designs.ops.linear_attention import attention_with_normaliser, linear_attention


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                weights = [sum(q[b, h, i, c] * k[b, h, j, c] for c in range(q.shape[3])) for j in range(k.shape[2])]
                y[b, h, i] = sum(w * v[b, h, j] for j, w in enumerate(weights)) / sum(weights)
    return y


def features(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu() + 0.05


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_it_is_the_formula(b: int, h: int, n: int, m: int, d: int, seed: int):
    q, k = features(b, h, n, d, seed=seed), features(b, h, m, d, seed=seed + 1)
    v = torch.randn(b, h, m, d, generator=torch.Generator().manual_seed(seed + 2))
    y, denominator = linear_attention(q, k, v)
    torch.testing.assert_close(y.double(), reference(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(denominator[..., 0], (q[:, :, :, None] * k[:, :, None]).sum((-1, -2)) / m, atol=1e-5, rtol=1e-5)


def test_a_query_orthogonal_to_every_key_gives_zero():
    y, _ = linear_attention(torch.zeros(1, 1, 3, 4), features(1, 1, 5, 4, seed=0), torch.ones(1, 1, 5, 4))
    assert torch.equal(y, torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_in_range_over_many_keys(dtype: torch.dtype):
    q, k, v = features(1, 1, 4, 32, seed=0) * 8, features(1, 1, 65_536, 32, seed=1) * 8, features(1, 1, 65_536, 32, seed=2) * 8
    full, _ = linear_attention(q.double(), k.double(), v.double())
    half, _ = linear_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    torch.testing.assert_close(half.double(), full, rtol=2e-2, atol=0)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_softmax_and_its_normaliser(n: int, p: int, d: int, masked: bool, seed: int):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, size, d, generator=g) * 3 for size in (n, p, p))
    mask = (torch.rand(2, 1, 1, p, generator=g) > 0.4) | (torch.arange(p) == 0) if masked else None
    y, normaliser = attention_with_normaliser(q, k, v, mask, 0.7)
    scores = 0.7 * q.double() @ k.double().mT
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(y.double(), scores.softmax(-1) @ v.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normaliser.double(), scores.logsumexp(-1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_softmax_over_keys_that_are_all_masked_has_no_weight():
    q, k, v = (torch.randn(1, 1, size, 4) for size in (2, 3, 3))
    y, normaliser = attention_with_normaliser(q, k, v, torch.zeros(1, 1, 1, 3, dtype=torch.bool), 0.5)
    assert torch.equal(y, torch.zeros_like(y))
    assert (normaliser < -1e30).all()


def test_attention_over_no_keys_has_no_weight():
    q, none = torch.rand(2, 3, 5, 4, requires_grad=True), torch.rand(2, 3, 0, 4)
    y, log_normaliser = attention_with_normaliser(q, none, none, None, 1.0)
    assert y.shape == q.shape
    assert not y.any()
    assert torch.equal(torch.sigmoid(0 - log_normaliser), torch.ones(2, 3, 5, 1))
