"""Designs as somebody else would write them, one class each: a window softmax that adds nothing, one for video, a feed-forward one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import edit_compile as ec


class Window(ec.Design):
    """Softmax within windows of the image (after CLEAR, arXiv 2412.16112); other tokens attend to everything. Adds no parameters."""

    name = "window"

    class Options(ec.Design.Options):
        side: int = 4

    @classmethod
    def accepts(cls, site, options):
        if site.grid_dims not in (2, None) or site.mask != "none":
            return ec.Verdict(False, "it needs a grid of rows and columns, and no mask")
        return ec.Verdict(True, f"softmax within windows of {options.side} x {options.side}")

    def __init__(self, site, options):
        super().__init__(site, options)
        self.side, self.scale = options.side, site.scale

    def forward(self, x, tokens):
        (h, w), k = tokens.grid, self.side
        rows, columns = -h % k, -w % k  # of padding

        def windows(t):
            image = F.pad(t.unflatten(2, (h, w)), (0, 0, 0, columns, 0, rows))
            return image.unflatten(3, (-1, k)).unflatten(2, (-1, k)).transpose(3, 4).flatten(4, 5)

        counts = windows(torch.ones_like(tokens.image(x.query)[:1, :1, :, :1]))[..., 0] > 0
        q, key, value = (windows(tokens.image(t)) for t in (x.query, x.key, x.value))
        y = F.scaled_dot_product_attention(q, key, value, counts[..., None, :], scale=self.scale)
        y = y.unflatten(4, (k, k)).transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :h, :w].flatten(2, 3)
        others = F.scaled_dot_product_attention(tokens.others(x.query), x.key, x.value, scale=self.scale)
        return tokens.joined(y, others)

    @classmethod
    def flops(cls, site, grid, others, options):
        keys, padded = options.side**2, math.prod(-(-n // options.side) * options.side for n in grid)
        return 4 * site.heads * site.head_dim * (padded * keys + others * (math.prod(grid) + others))

    @classmethod
    def allows(cls, rows, columns, grid, options):
        return max(rows, columns) <= options.side**2


class VideoLinear(ec.Design):
    """Linear attention over (t, h, w) with keys and values compressed in space by a convolution that sees the frames around."""

    name = "video-linear"

    class Options(ec.Design.Options):
        stride: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def accepts(cls, site, options):
        fits = site.keys.only(ec.TokenKind.IMAGE) and site.grid_dims == 3
        return ec.Verdict(fits, "attention between the tokens of a video" if fits else "it needs image tokens alone, on a grid with time")

    def __init__(self, site, options):
        super().__init__(site, options)
        self.stride = options.stride
        self.key, self.value = (self.compressor(site.channels[f"after_{name}"]) for name in ("key", "value"))

    def compressor(self, channels):
        conv = nn.Conv3d(channels, channels, 3, stride=self.stride, padding=1, groups=channels)
        nn.init.dirac_(conv.weight, groups=channels)
        nn.init.zeros_(conv.bias)
        return conv

    def taps(self):
        return ec.Tap("after_key", self.key, self.stride), ec.Tap("after_value", self.value, self.stride)

    def forward(self, x, tokens):
        q, k = x.query.relu(), x.key.relu()
        return q @ (k.mT @ x.value) / (q @ k.sum(-2, keepdim=True).mT).clamp(min=1e-6)

    @classmethod
    def flops(cls, site, grid, others, options):
        n, m = math.prod(grid), math.prod(-(-size // step) for size, step in zip(grid, options.stride, strict=True))
        convolutions = 2 * 27 * m * (site.channels["after_key"] + site.channels["after_value"])
        return convolutions + 2 * site.heads * site.head_dim * ((n + m) * site.value_dim + n)


class ConvFFN(ec.Design):
    """A depthwise 3x3 between a feed-forward network's projections (after SANA, arXiv 2410.10629); at first it does nothing."""

    name, kind = "conv-ffn", "feed_forward"

    @classmethod
    def accepts(cls, site, options):
        return ec.Verdict(site.grid_dims in (2, None), "a convolution over its hidden channels")

    def __init__(self, site, options):
        super().__init__(site, options)
        channels = site.channels["before_output"]
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        nn.init.dirac_(self.conv.weight, groups=channels)
        nn.init.zeros_(self.conv.bias)

    def taps(self):
        return (ec.Tap("before_output", self.conv),)

    @classmethod
    def flops(cls, site, grid, others, options):
        return 18 * math.prod(grid) * site.channels["before_output"]


TRIALS = (Window, VideoLinear, ConvFFN)
