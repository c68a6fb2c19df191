"""CLEAR: softmax attention of image tokens to those around them, and to all other tokens (arXiv 2412.16112)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from edit_compile.designs.base import QKV, Design, Tokens, Verdict
from edit_compile.designs.ops.linear_attention import matching_heads
from edit_compile.designs.ops.local_attention import Window, attention_to_all, block_products, is_block_pair, local_attention, merged
from edit_compile.designs.ops.parts import Part
from edit_compile.designs.ops.site_checks import (
    any_attention,
    has_other_queries,
    softmax_attention,
)
from edit_compile.frozen import Frozen
from edit_compile.ir.site import Site
from edit_compile.ir.tokens import TokenKind


class Clear(Design):
    """I image rows, P the others, W(i) the image tokens at a distance below the radius from i:

    image rows:  SDPA(Q_i, [K_W(i); K_P], [V_W(i); V_P])
    other rows:  SDPA(Q_P, [K_I; K_P], [V_I; V_P])

    It adds no parameters. Where several images are in the sequence, each image's tokens see their own image's alone. That a
    video's window spans frames is ours.
    """

    name = "clear"

    class Options(Frozen):
        """CLEAR's options.

        Attributes:
            radius: Euclidean distance on the grid from which on image tokens are not seen; the paper has 8, 16 and 32.
            frames: of a video, distance in frames from which on they are not seen; between, the radius shrinks, as an ellipsoid's.
                1 is for the own frame alone. Without effect for images.
        """

        radius: PositiveInt = 8
        frames: PositiveInt = 2

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return any_attention(site)

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.window, self.scale = window(options), site.softmax_scale

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        keys, key, value = tokens.of_keys, matching_heads(x.query, x.key), matching_heads(x.query, x.value)
        query, mask = tokens.image(x.query), keys.image(x.mask, -1) if x.mask is not None else None
        y, normaliser = self.among_image_tokens(QKV(query, keys.image(key), keys.image(value), mask), tokens)
        if not keys.only_image:
            mask = keys.others(x.mask, -1) if x.mask is not None else None
            y, _ = merged(y, normaliser, *attention_to_all(query, keys.others(key), keys.others(value), mask, self.scale))
        if tokens.only_image:
            return y
        return tokens.joined(y, F.scaled_dot_product_attention(tokens.others(x.query), key, value, x.mask, scale=self.scale))

    def among_image_tokens(self, x: QKV, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Compute attention of image tokens to image tokens, (B, H, N, E), and the logarithm of its normaliser, (B, H, N, 1)."""
        found, start = [], 0
        for grid in tokens.grids or (tokens.grid,):
            image = _narrowed(x, start, math.prod(grid))
            found.append(local_attention(image.query, image.key, image.value, grid, self.window, self.scale, image.mask))
            start += math.prod(grid)
        y, normaliser = ([each[i] for each in found] for i in range(2))
        return found[0] if len(found) == 1 else (torch.cat(y, 2), torch.cat(normaliser, 2))

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        """List softmax attention within blocks, to other keys, and of other queries to all keys."""
        n, (blocks, queries, keys) = math.prod(grid), block_products(grid, window(options))
        to_others = () if site.keys.only(TokenKind.IMAGE) else (softmax_attention(site, n, others),)
        of_others = (softmax_attention(site, others, n + others),) if has_other_queries(site) else ()
        return (softmax_attention(site, queries, keys, blocks), *to_others, *of_others)

    @classmethod
    def allows(cls, rows: int, columns: int, grid: Sequence[int], options: Any) -> bool:
        """Allow the queries of a block against its keys."""
        return min(rows, columns) <= 1 or is_block_pair(rows, columns, grid, window(options))


def window(options: Any) -> Window:
    """Return the window that options describe."""
    return Window(options.radius, options.frames)


def _narrowed(x: QKV, start: int, length: int) -> QKV:
    """Return the operands of one image of several."""
    mask = x.mask.narrow(-1, start, length) if x.mask is not None else None
    return QKV(x.query.narrow(2, start, length), x.key.narrow(2, start, length), x.value.narrow(2, start, length), mask)
