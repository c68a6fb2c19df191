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
from edit_compile.designs.ops.linear_attention import NO_WEIGHT, at_least_float32
from edit_compile.designs.ops.local_attention import merged, weight_within
from edit_compile.ir.site import Site

SMALLEST_NUMBER = 1e-3  # of tokens: less is rounding


class LocalLinear(Clear):
    """CLEAR's attention, to which every image query i adds the image tokens R(i) outside of its window, as linear attention:

    y_i = (sum_{j in W(i), P} exp(s q_i k_j) v_j + a Z_i r_i) / (sum_{j in W(i), P} exp(s q_i k_j) + a Z_i)

    Z_i and r_i stand for the sum of exp(s q_i k_j) and the mean of V that it weights, over R(i). With d_j = s q_i (k_j - mean k),
    exp(s q_i k_j) is exp(s q_i mean k) exp(d_j), and exp(d) is taken as 1 + d + d^2 / 2, which is positive. Then

    Z_i = |R(i)| exp(s q_i mean k) (1 + var / 2),   r_i = mean v + s cov(v, k) q_i / (1 + var / 2),   var = s^2 q_i cov(k, k) q_i

    with means and covariances of all image tokens, in which d_j^2 and v_j count as independent. So untrained it is near the
    teacher, and r_i never far from the values. What is learned is a, one for each head, which begins at 1. This form is ours. Where
    several images are in the sequence, R(i) has the others' tokens, too.
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
        weights, start, within = _key_weights(x), 0, []
        for grid in tokens.grids or (tokens.grid,):
            within.append(weight_within(weights.narrow(2, start, math.prod(grid)), grid, self.window))
            start += math.prod(grid)
        outside = weights.sum(2, keepdim=True) - (within[0] if len(within) == 1 else torch.cat(within, 2))
        some = outside > SMALLEST_NUMBER
        return torch.where(some, torch.where(some, outside, 1).log(), NO_WEIGHT)

    @classmethod
    def flops(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> int:
        """Count what CLEAR does, covariances of K with K and V, and for each query both products with them, and one with mean k."""
        moments = 2 * site.heads * math.prod(grid) * site.head_dim * (2 * (site.head_dim + site.value_dim) + 1)
        return super().flops(site, grid, others, options) + moments


def attention_by_moments(x: QKV, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention with exp(s q k) replaced as in `LocalLinear`, from means and covariances of keys and values.

    Returns:
        r, (B, H, N, E), and log(exp(s q mean k) (1 + var / 2)), (B, H, N, 1), in float32 or higher: that of the mean weight.
    """
    weights = _key_weights(x)
    relative = weights / weights.mean(2, keepdim=True).clamp(min=SMALLEST_NUMBER / x.key.shape[2])
    mean_k, mean_v = ((each * relative.to(each.dtype)).mean(2, keepdim=True) for each in (x.key, x.value))
    k, v = x.key - mean_k, x.value - mean_v
    root = (relative / x.key.shape[2]).sqrt().to(k.dtype)  # shared between both operands, so that neither underflows
    covariances = (k * root).transpose(-1, -2) @ (torch.cat([k, v], -1) * root)
    query = x.query * scale
    both, channels, dtype = query @ covariances, k.shape[-1], at_least_float32(query)
    half_variance = (both[..., :channels] * query).sum(-1, keepdim=True, dtype=dtype).clamp(min=0) / 2
    log_mean_weight = (query @ mean_k.transpose(-1, -2)).to(dtype) + half_variance.log1p()
    return mean_v + both[..., channels:] / (1 + half_variance).to(v.dtype), log_mean_weight


def _key_weights(x: QKV) -> Tensor:
    """Return by what a mask by key multiplies the weights of keys, (B or 1, H or 1, N, 1), in float32 or higher."""
    dtype = at_least_float32(x.key)
    if x.mask is None:
        return torch.ones_like(x.key[:1, :1, :, :1], dtype=dtype)
    weights = x.mask if x.mask.dtype == torch.bool else x.mask.to(dtype).exp()
    return weights.to(dtype).expand(-1, -1, -1, x.key.shape[2]).transpose(-1, -2)
