"""What a design's work consists of: the products and the softmax attention for which a machine has kernels at its best rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Matrix products, `count` of them, of (rows, inner) by (inner, columns). A convolution is one: its kernel's taps are in `inner`."""

    rows: int
    columns: int
    inner: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.count * self.rows * self.columns * self.inner


@dataclass(frozen=True)
class Softmax:
    """Softmax attention of `queries` to `keys` by a fused kernel, for `count` heads."""

    queries: int
    keys: int
    head_dim: int
    value_dim: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.count * self.queries * self.keys * (self.head_dim + self.value_dim)


Part = Product | Softmax


def total_flops(parts: Iterable[Part]) -> int:
    """Sum up the FLOPs of parts."""
    return sum(part.flops for part in parts)
