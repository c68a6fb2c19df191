"""The trainable modules that EDiT adds: ConvFusion before the query's Linear, the compressor after the key's and value's.

They map images (B, C, h, w) and videos (B, C, t, h, w), as taps do. In a video every frame is an image of its own, the
group norm's statistics included; what frames exchange, they exchange in a `TemporalKernel`. So a frame's result depends on
no other frame without one, on none after it with a causal one, and never on the length of the clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.designs.ops.kernels.choice import KernelCase
from edit_compile.errors import ConfigError

MAX_GROUPS = 32
TEMPORAL_TAPS = 3  # frames that a temporal kernel sees

Temporal = Literal["none", "centred", "causal"]


def group_count(channels: int) -> int:
    """Return the largest number of groups up to 32 that divides the channels."""
    return next(g for g in range(min(MAX_GROUPS, channels), 0, -1) if channels % g == 0)


def per_frame(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a module that maps images (B, C, h, w) on an image, or on every frame of a video (B, C, t, h, w)."""
    if x.ndim == 4:
        return module(x)
    frames = module(x.transpose(1, 2).flatten(0, 1))
    return torch.unflatten(frames, 0, (-1, x.shape[2])).transpose(1, 2)


class TemporalKernel(nn.Conv2d):
    """A depthwise convolution over time, (B, C, t, h, w) to (B, C, ceil(t / stride), h, w); an image is a video of one frame.

    Of three taps, the middle one is a frame's own if it is centred, the last one if it is causal, which sees no later frame.
    With `identity` that tap starts at one and the others at zero.

    Raises:
        ConfigError: `temporal` is "none", for which there is no kernel.
    """

    def __init__(self, channels: int, temporal: Temporal, *, stride: int = 1, identity: bool = True) -> None:
        if temporal == "none":
            raise ConfigError("temporal='none' has no kernel")
        # Rows are frames and columns their positions, so that it is a convolution in two dimensions, which all backends run well.
        super().__init__(channels, channels, (TEMPORAL_TAPS, 1), stride=(stride, 1), groups=channels)
        before = (TEMPORAL_TAPS - 1) // 2 if temporal == "centred" else TEMPORAL_TAPS - 1
        self.frames_around = (before, TEMPORAL_TAPS - 1 - before)
        if identity:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)  # type: ignore[arg-type]
            with torch.no_grad():
                self.weight[:, :, before] = 1

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.forward(x.unsqueeze(2)).squeeze(2)
        padded = F.pad(x.flatten(3), (0, 0, *self.frames_around))
        return torch.unflatten(super().forward(padded), 3, x.shape[3:])


class GroupNorm(nn.GroupNorm):
    """Torch's, which refuses a single value, such as a channel of its own in an image of one token; here it becomes the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PointwiseConv(nn.Conv2d):
    """A convolution of kernel size 1, (B, C, h, w) to (B, C', h, w), as the product of matrices that it is: the backend of a convolution,
    and with it the compiled graph, would depend on the image's size.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


def _temporal(channels: int, temporal: Temporal, *, stride: int = 1, identity: bool) -> TemporalKernel | None:
    return TemporalKernel(channels, temporal, stride=stride, identity=identity) if temporal != "none" else None


class ConvFusion(nn.Module):
    """X + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(X)))) (EDiT, arXiv 2503.16726): local context for the query.

    The 3x3 reduces the channels `reduction` times, the 1x1 restores them; with `identity` it starts at zero, so
    that an untrained query equals the teacher's. A temporal kernel follows the 3x3, on the reduced channels.
    If it is `separable`, the 3x3 is a depthwise one and a 1x1, that reduces: an eighth of its FLOPs or so.
    """

    def __init__(
        self, channels: int, reduction: int, *, temporal: Temporal = "none", identity: bool = True, separable: bool = False
    ) -> None:
        super().__init__()
        if reduction < 1 or channels % reduction:
            raise ConfigError(f"reduction={reduction} does not divide the {channels} channels of this site")
        hidden = channels // reduction
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if separable else None
        self.reduce = PointwiseConv(channels, hidden, 1) if separable else nn.Conv2d(channels, hidden, 3, padding=1)
        self.temporal = _temporal(hidden, temporal, identity=identity)
        self.norm = GroupNorm(group_count(hidden), hidden)
        self.activation = nn.LeakyReLU(0.01)
        self.restore = PointwiseConv(hidden, channels, 1)
        if identity:
            for parameter in self.restore.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        hidden = per_frame(self.reduce, x if self.depthwise is None else per_frame(self.depthwise, x))
        if self.temporal is not None:
            hidden = self.temporal(hidden)
        return x + per_frame(lambda frame: self.restore(self.activation(self.norm(frame))), hidden)


class SpatialCompressor(nn.Module):
    """DepthwiseConv3x3, stride 2 (EDiT): a quarter of the keys or values; an odd grid gives ceil(h/2) x ceil(w/2).

    A temporal kernel follows, and may thin the frames to ceil(t / temporal_stride). With `identity` the kernels start as
    single taps, which sample the teacher's own keys and values.

    Raises:
        ConfigError: frames are to be thinned without a temporal kernel: those between would be lost.

    Attributes:
        triton_kernel: what computes the depthwise convolution where nothing is trained, if that is to be a kernel.
    """

    triton_kernel: Callable[..., Tensor | None] | None = None

    def __init__(
        self, channels: int, *, stride: int = 2, temporal: Temporal = "none", temporal_stride: int = 1, identity: bool = True
    ) -> None:
        super().__init__()
        if temporal == "none" and temporal_stride != 1:
            raise ConfigError(f"temporal_stride={temporal_stride} needs temporal='centred' or 'causal': without a kernel frames are lost")
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels)
        self.temporal = _temporal(channels, temporal, stride=temporal_stride, identity=identity)
        if identity:
            for parameter in self.conv.parameters():
                nn.init.zeros_(parameter)
            with torch.no_grad():
                self.conv.weight[:, :, 1, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        compressed = per_frame(self._convolved, x)
        return compressed if self.temporal is None else self.temporal(compressed)

    def _convolved(self, x: Tensor) -> Tensor:
        found = None if self.triton_kernel is None else self.triton_kernel(self.conv, x)
        return self.conv(x) if found is None else found

    @property
    def kernel_case(self) -> KernelCase:
        """What a kernel would compute here."""
        return KernelCase(operator="depthwise", sizes=(self.conv.out_channels, self.conv.stride[0]))
