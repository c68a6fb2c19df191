"""Feature maps: what makes the queries and keys of linear attention non-negative. They map (B, H, N, D) to the same."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from edit_compile.designs.ops.parts import Part, Product

FeatureMap = Literal["relu", "elu", "learned"]


def elu_plus_one(x: Tensor) -> Tensor:
    """Compute ELU(x) + 1 (Katharopoulos et al., arXiv 2006.16236), exp(x) below zero: the sum would round it away in half precision."""
    return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())


class EluPlusOne(nn.Module):
    """`elu_plus_one`."""

    def forward(self, x: Tensor) -> Tensor:
        return elu_plus_one(x)


class HeadwiseMap(nn.Module):
    """ReLU(W_h x + b_h) with a matrix and a bias for each head (T2R, arXiv 2103.13076). It starts as ReLU(x)."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight + self.bias).relu()


def feature_map(kind: FeatureMap, heads: int, channels: int) -> nn.Module:
    """Make the map of one site's queries, or of its keys."""
    if kind == "learned":
        return HeadwiseMap(heads, channels)
    return nn.ReLU() if kind == "relu" else EluPlusOne()


def feature_map_parts(kind: FeatureMap, heads: int, channels: int, tokens: int) -> tuple[Part, ...]:
    """List the products of a learned map, 2 H N D^2 FLOPs; the others are pointwise."""
    return (Product(tokens, channels, channels, heads),) if kind == "learned" else ()
