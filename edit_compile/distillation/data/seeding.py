"""Seeds, noise and low-discrepancy numbers: functions of a sample's position, so that none of them has to be saved or shared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0.6180339887498949


def seed_of(*parts: object) -> int:
    """Return a seed that differs wherever the parts differ."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def uniform(*parts: object) -> float:
    """Return a number in [0, 1) that differs wherever the parts differ."""
    return seed_of(*parts) / 2**56


def caption_draw(drops: float, seed: int, split: str, position: int) -> int | None:
    """Draw a number that chooses among a sample's captions (modulo how many it has), or None for the empty caption.

    Validation always has the first.

    Args:
        drops: the share of training samples that get the empty caption.
    """
    if split != "train":
        return 0
    return None if uniform(seed, "empty", position) < drops else seed_of(seed, "caption", position)


def noise_for(positions: Sequence[int], shape: Sequence[int], seed: int, split: str) -> Tensor:
    """Draw standard normal noise, (len(positions), *shape), each row seeded by its position."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(seed, split, p))) for p in positions]
    return torch.stack(rows)


def low_discrepancy(positions: Sequence[int], seed: int) -> Tensor:
    """Return a number in (0, 1) for each of B positions, (B,) float64, neighbours spread evenly.

    It is an additive recurrence by the golden ratio.
    """
    start = uniform(seed, "spread")
    return torch.tensor([(start + p * _GOLDEN) % 1 for p in positions], dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
