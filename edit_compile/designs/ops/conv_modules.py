"""The trainable modules that EDiT adds: ConvFusion before the query's Linear, the compressor after the key's and value's.

Both map images (B, C, h, w), as taps do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edit_compile.errors import ConfigError

MAX_GROUPS = 32


def group_count(channels: int) -> int:
    """Return the largest number of groups up to 32 that divides the channels."""
    return next(g for g in range(min(MAX_GROUPS, channels), 0, -1) if channels % g == 0)


class ConvFusion(nn.Module):
    """X + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(X)))) (EDiT, arXiv 2503.16726): local context for the query.

    The 3x3 reduces the channels `reduction` times, the 1x1 restores them; with `identity` it starts at zero, so
    that an untrained query equals the teacher's.
    """

    def __init__(self, channels: int, reduction: int, *, identity: bool = True) -> None:
        super().__init__()
        if reduction < 1 or channels % reduction:
            raise ConfigError(f"reduction={reduction} does not divide the {channels} channels of this site")
        hidden = channels // reduction
        self.reduce = nn.Conv2d(channels, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(group_count(hidden), hidden)
        self.activation = nn.LeakyReLU(0.01)
        self.restore = nn.Conv2d(hidden, channels, 1)
        if identity:
            for parameter in self.restore.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x_BChw: Tensor) -> Tensor:
        hidden: Tensor = self.restore(self.activation(self.norm(self.reduce(x_BChw))))
        return x_BChw + hidden


class SpatialCompressor(nn.Module):
    """DepthwiseConv3x3, stride 2 (EDiT): a quarter of the keys or values; an odd grid gives ceil(h/2) x ceil(w/2).

    With `identity` the kernels start as centre taps, which sample the teacher's own keys and values.
    """

    def __init__(self, channels: int, *, stride: int = 2, identity: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels)
        if identity:
            for parameter in self.conv.parameters():
                nn.init.zeros_(parameter)
            with torch.no_grad():
                self.conv.weight[:, :, 1, 1] = 1

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(map(int, self.conv.stride))

    def forward(self, x_BChw: Tensor) -> Tensor:
        compressed: Tensor = self.conv(x_BChw)
        return compressed
