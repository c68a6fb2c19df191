"""Designs that look at windows of the image, on plain tensors: who sees whom, one pair of tokens after the other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from edit_compile.designs import find_design
from edit_compile.designs.base import QKV, Tokens
from edit_compile.ir.site import Site
from edit_compile.ir.tokens import TokenLayout

Grid = tuple[int, ...]
HEADS, KEY_HEADS, SIZE = 4, 2, 3


def place(grid: Grid, index: int) -> tuple[int, int, int]:
    frames, height, width = (1, *grid)[-3:]
    assert index < frames * height * width
    return index // (height * width), index // width % height, index % width


def sees(options: Any, grids: tuple[Grid, ...], i: int, j: int) -> bool:
    """Whether image token i sees image token j, of images one after the other."""
    for grid in grids:
        n = math.prod(grid)
        if i < n:
            if not 0 <= j < n:
                return False
            (t, y, x), (s, v, u) = place(grid, i), place(grid, j)
            return (
                math.dist(
                    (t / options.frames, y / options.radius, x / options.radius),
                    (s / options.frames, v / options.radius, u / options.radius),
                )
                < 1 - 1e-9
            )
        i, j = i - n, j - n
    raise AssertionError


def site(queries: TokenLayout, keys: TokenLayout, dims: int) -> Site:
    return Site("attention", "a", queries, keys, dims, heads=HEADS, key_heads=KEY_HEADS, head_dim=SIZE, value_dim=SIZE)


def layout(before: int, n: int, after: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    segments = [(kind, length) for kind, length in (("other", before), ("image", n), ("text", after)) if length]
    return tuple(kind for kind, _ in segments), tuple(length for _, length in segments)


def operands(queries: int, keys: int, batch: int, seed: int = 0) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(batch, heads, length, SIZE, generator=generator, dtype=torch.float64)
        for heads, length in ((HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys))
    ]
    return QKV(*made)


def key_mask(kind: str, length: int, batch: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    counts = torch.rand(batch, 1, 1, length, generator=generator) > 0.3
    return counts if kind == "boolean" else torch.where(counts, 0.5, -3.0).double()


class Case:
    """A design on plain tensors: image tokens on grids, with others before and after them among the keys, and the queries if `joint`."""

    def __init__(
        self, name: str, options: dict[str, Any], grids: tuple[Grid, ...], before: int, after: int, joint: bool, mask: str
    ) -> None:
        self.options, self.grids, n = find_design(name).Options(**options), grids, sum(map(math.prod, grids))
        kinds, lengths = layout(before, n, after)
        of_queries = (kinds, lengths) if joint else (("image",), (n,))
        grid, several = (grids[0], ()) if len(grids) == 1 else ((), grids)
        keys = None if joint or of_queries == (kinds, lengths) else Tokens(kinds, lengths, grid, several)
        self.tokens = Tokens(*of_queries, grid, several, keys)
        self.x = operands(sum(of_queries[1]), sum(lengths), 2)._replace(mask=key_mask(mask, sum(lengths), 2))
        self.start, self.first_query, self.n = before, before if joint else 0, n
        layouts = [TokenLayout.of(*zip(*each, strict=True)) for each in (of_queries, (kinds, lengths))]
        self.design = find_design(name)(site(*layouts, len(grids[0])), self.options).double()

    def image_of(self, index: int, first: int) -> int | None:
        return index - first if first <= index < first + self.n else None

    def weights(self) -> Tensor:
        """Of every key for every query (B, H, L, M): exp of the score where it is seen, zero where it is not."""
        weights = (self.x.query @ self.keys().mT / math.sqrt(SIZE)).exp()
        if self.x.mask is not None:
            weights = weights * (self.x.mask if self.x.mask.dtype == torch.bool else self.x.mask.exp())
        for i, j in itertools.product(range(weights.shape[2]), range(weights.shape[3])):
            own, other = self.image_of(i, self.first_query), self.image_of(j, self.start)
            if own is not None and other is not None and not sees(self.options, self.grids, own, other):
                weights[:, :, i, j] = 0
        return weights

    def keys(self) -> Tensor:
        return self.x.key.repeat_interleave(HEADS // KEY_HEADS, 1)

    def values(self) -> Tensor:
        return self.x.value.repeat_interleave(HEADS // KEY_HEADS, 1)


GRIDS: list[tuple[Grid, ...]] = [((5, 4),), ((1, 1),), ((9, 3),), ((2, 3, 4),), ((3, 9, 1),), ((4, 3), (2, 5)), ((1, 9), (3, 2), (2, 2))]
