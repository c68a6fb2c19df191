"""Window softmax with linear attention to the rest of the image, in one normaliser (after SLA, LoLCATs and ReHyAt)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from edit_compile.designs.base import QKV, Tokens
from edit_compile.designs.clear import Clear
from edit_compile.designs.ops.key_masks import NO_WEIGHT, at_least_float32, key_weights
from edit_compile.designs.ops.linear_attention import or_one
from edit_compile.designs.ops.local_attention import merged, weight_within
from edit_compile.designs.ops.parts import Part, Product
from edit_compile.ir.site import Site

SMALLEST_NUMBER = 1e-3  # of tokens: less is rounding


class LocalLinear(Clear):
    """CLEAR's attention, to which every image query i adds the image tokens R(i) outside of its window, as linear attention:

    y_i = (sum_{j in W(i), P} exp(s q_i k_j) v_j + a Z_i r_i) / (sum_{j in W(i), P} exp(s q_i k_j) + a Z_i)

    Z_i and r_i stand for the sum of exp(s q_i k_j) and the mean of V that it weights, over R(i). With d_j = s q_i (k_j - mean k),
    exp(s q_i k_j) is exp(s q_i mean k) exp(d_j), and exp(d) is taken as 1 + d + d^2 / 2, which is positive. Then

    Z_i = |R(i)| exp(s q_i mean k) (1 + var / 2),   r_i = mean v + s cov(v, k) q_i / (1 + var / 2),   var = s^2 q_i cov(k, k) q_i

    with means and covariances of all image tokens, in which d_j^2 and v_j count as independent. So r_i is never far from the values,
    and untrained it is near the teacher as long as var is small, up to about 2: of sharper attention outside of the window, Z_i is
    too small. What is learned is a, one for each head, which begins at 1. This form is ours. Where several images are in the
    sequence, R(i) has the others' tokens, too.
    """

    name = "local-linear"

    class Options(Clear.Options):
        """CLEAR's options; a smaller window does, as nothing outside of it is lost.

        Attributes:
            radius, frames: see CLEAR's options.
        """

        radius: PositiveInt = 4

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.log_weight = nn.Parameter(torch.zeros(site.heads, 1, 1))

    def among_image_tokens(self, x: QKV, tokens: Tokens) -> tuple[Tensor, Tensor]:
        near, near_normaliser = super().among_image_tokens(x, tokens)
        far, far_normaliser = attention_by_moments(x, self.scale)
        outside = self._log_number_outside(x, tokens) + self.log_weight.to(far_normaliser.dtype)
        return merged(near, near_normaliser, far, far_normaliser + outside)

    def _log_number_outside(self, x: QKV, tokens: Tokens) -> Tensor:
        """Return the logarithm of the number of image tokens outside of each one's window, those that count, (B or 1, H or 1, N, 1)."""
        (weights, log_scale), start, within = _key_weights(x), 0, []
        for grid in tokens.grids or (tokens.grid,):
            within.append(weight_within(weights.narrow(2, start, math.prod(grid)), grid, self.window))
            start += math.prod(grid)
        outside = weights.sum(2, keepdim=True) - (within[0] if len(within) == 1 else torch.cat(within, 2))
        some = outside > SMALLEST_NUMBER
        return torch.where(some, torch.where(some, outside, 1).log() + log_scale, NO_WEIGHT)

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        """List what CLEAR does, covariances of K with K and V, and for each query the products with them."""
        n, d, both = math.prod(grid), site.head_dim, site.head_dim + site.value_dim
        return (*super().parts(site, grid, others, options), Product(d, both, n, site.heads), Product(n, both, d, site.heads))


def attention_by_moments(x: QKV, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention with exp(s q k) replaced as in `LocalLinear`, from means and covariances of keys and values.

    Returns:
        r, (B, H, N, E), and log(exp(s q mean k) (1 + var / 2)), (B, H, N, 1), in float32 or higher: that of the mean weight.
    """
    weights, _ = _key_weights(x)
    share = weights / weights.sum(2, keepdim=True).clamp(min=1)  # at least 1, the largest weight, unless every key is masked
    mean_k, mean_v = ((each * share).sum(2, keepdim=True) for each in (x.key, x.value))
    k, v = x.key - mean_k, x.value - mean_v
    # In half precision the products stay in range: keys are divided by each channel's deviation, queries multiplied by it and divided
    # by their sums; a key's share is on both sides, as its root. As it cancels, none of this is for gradients.
    deviation, root = (k.square() * share).sum(2, keepdim=True).detach().sqrt(), share.detach().sqrt()
    keys = k / or_one(deviation)
    both = torch.cat([keys, v], -1) * (share / or_one(root))
    query = x.query * (deviation * scale)
    norm = query.detach().abs().sum(-1, keepdim=True)
    query = (query / or_one(norm)).to(x.value.dtype)
    covariances = (keys * root).to(x.value.dtype).transpose(-1, -2) @ both.to(x.value.dtype)
    by_key, by_value = torch.split(query @ covariances, [k.shape[-1], v.shape[-1]], -1)
    half_variance = (by_key * query).sum(-1, keepdim=True, dtype=norm.dtype).clamp(min=0) * norm.square() / 2
    log_mean_weight = (x.query * (mean_k * scale)).sum(-1, keepdim=True) + half_variance.log1p()
    return (mean_v + by_value * (norm / (1 + half_variance))).to(x.value.dtype), log_mean_weight


def _key_weights(x: QKV) -> tuple[Tensor, Tensor]:
    """Return by what a mask by key multiplies the weights of keys, (B or 1, H or 1, N, 1), and a logarithm that is to be added."""
    dtype = at_least_float32(x.key)
    if x.mask is None:
        return torch.ones_like(x.key[:1, :1, :, :1], dtype=dtype), x.key.new_zeros((), dtype=dtype)
    return key_weights(x.mask, dtype)
