"""KV compression: softmax attention over fewer image keys (PixArt-Sigma, arXiv 2403.04692)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edit_compile.designs.base import QKV, Design, Tap, Tokens, Verdict, thinned_grid
from edit_compile.designs.ops.conv_modules import per_frame
from edit_compile.designs.ops.key_masks import key_bias
from edit_compile.designs.ops.linear_attention import matching_heads
from edit_compile.designs.ops.parts import Part, Product
from edit_compile.designs.ops.site_checks import (
    any_attention,
    sequence_lengths,
    softmax_attention,
)
from edit_compile.frozen import Frozen
from edit_compile.ir.site import Place, Site
from edit_compile.ir.tokens import TokenKind

_COMPRESSED: tuple[Place, Place] = ("after_key", "after_value")


class WindowMean(nn.Module):
    """LayerNorm(DepthwiseConv k x k, stride k) (PixArt-Sigma), (B, C, h, w) to (B, C, ceil(h / k), ceil(w / k)).

    It starts as the mean of each window. Windows that the image does not fill repeat its last row and column. A video is mapped
    frame by frame.
    """

    def __init__(self, channels: int, factor: int, *, layer_norm: bool = False) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels, factor, stride=factor, groups=channels)
        self.norm = nn.LayerNorm(channels) if layer_norm else nn.Identity()
        nn.init.constant_(self.conv.weight, 1 / factor**2)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self._compress, x)

    def _compress(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        filled = F.pad(image, (0, -width % self.factor, 0, -height % self.factor), mode="replicate")
        means: Tensor = self.norm(self.conv(filled).movedim(1, -1))
        return means.movedim(-1, 1)


class KVCompress(Design):
    """softmax(Q_i K^T) V over all queries, with the image tokens' K and V compressed k x k by a depthwise convolution.

    It remains quadratic, at 1 / k^2 of the cost. Other tokens' keys and values, where a site has them, are as they are, and all
    queries attend to the same keys. What is indexed by token, as RoPE, is that of each window's first token. Of a video the
    windows are within frames.

    PixArt-Sigma has no other tokens among its keys, and a LayerNorm behind each convolution, which discards the scale of keys and
    values. Balance, and to begin without LayerNorm, are ours: untrained, demo/mm-dit's error is 0.015 so, 0.040 without balance and
    0.048 with LayerNorm (benchmarks/starts.py).
    """

    name = "kv-compress"

    class Options(Frozen):
        """The options of KV compression.

        Attributes:
            factor: k, the side of the windows of keys and values that become one.
            layer_norm: normalise compressed keys and values, as PixArt-Sigma does; without it they are the teacher's means at first.
            balance: where other tokens are among the keys, add to a compressed key's score the logarithm of the number of tokens
                that it stands for, so that image and other tokens share the softmax as in the teacher.
        """

        factor: int = Field(default=2, ge=2)
        layer_norm: bool = False
        balance: bool = True

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return any_attention(site)

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.scale = site.scale
        self.stride = (1, *_stride(options)) if site.grid_dims == 3 else _stride(options)
        key, value = (WindowMean(site.channels[place], options.factor, layer_norm=options.layer_norm) for place in _COMPRESSED)
        self.key, self.value = key, value
        self.balances = options.balance and not site.keys.only(TokenKind.IMAGE)

    def taps(self) -> tuple[Tap, ...]:
        return tuple(Tap(place, module, self.stride) for place, module in zip(_COMPRESSED, (self.key, self.value), strict=True))

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        key, value = matching_heads(x.query, x.key), matching_heads(x.query, x.value)
        mask = _balanced(x.mask, tokens.of_keys.counts(self.stride, x.query), x.query.dtype) if self.balances else x.mask
        return F.scaled_dot_product_attention(x.query, key, value, mask, scale=self.scale)

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        """List the convolutions, 2 k^2 C M FLOPs each, M compressed keys, and softmax attention over them and the other tokens'."""
        m = _compressed_tokens(grid, options)
        convolutions = tuple(Product(m, site.channels[place], options.factor**2) for place in _COMPRESSED)
        return (*convolutions, softmax_attention(site, *sequence_lengths(site, math.prod(grid), m, others)))

    @classmethod
    def allows(cls, rows: int, columns: int, grid: Sequence[int], options: Any) -> bool:
        """Allow every query against the compressed keys."""
        return min(rows, columns) <= _compressed_tokens(grid, options)


def _balanced(mask: Tensor | None, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask by key (..., 1, M) to add to scores, with the logarithms of the counts of the keys (M,) in it."""
    bias = counts.log().to(dtype)[None, None, None]
    return bias if mask is None else bias + key_bias(mask, dtype)


def _stride(options: Any) -> tuple[int, int]:
    return options.factor, options.factor


def _compressed_tokens(grid: Sequence[int], options: Any) -> int:
    return math.prod(thinned_grid(grid, _stride(options)))
