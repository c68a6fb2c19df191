"""Seeds, noise and low-discrepancy numbers: functions of a sample's position, so that nothing about them has to be saved or shared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0.6180339887498949


def seed_of(*parts: object) -> int:
    """A seed that differs wherever the parts differ."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def noise_for(positions: Sequence[int], shape: Sequence[int], seed: int, split: str) -> Tensor:
    """Standard normal noise, (len(positions), *shape), each row seeded by its position."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(seed, split, p))) for p in positions]
    return torch.stack(rows)


def spread(positions: Sequence[int], seed: int) -> Tensor:
    """A number in (0, 1) for each position, (B,) float64: neighbours are spread evenly (additive recurrence by the golden ratio)."""
    start = seed_of(seed, "spread") / 2**56
    return torch.tensor([(start + p * _GOLDEN) % 1 for p in positions], dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
