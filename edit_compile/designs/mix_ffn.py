"""Mix-FFN: a gated 3x3 depthwise convolution in the feed-forward networks of image tokens (SANA, arXiv 2410.10629)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.designs.base import Design, Tap, Verdict
from edit_compile.designs.ops.conv_modules import per_frame
from edit_compile.designs.ops.parts import Part, Product
from edit_compile.designs.ops.site_checks import GRID_DIMS
from edit_compile.frozen import Frozen
from edit_compile.ir.site import Site


class GatedConv(nn.Module):
    """U (1 + SiLU(G)), U and G each a 3x3 depthwise convolution, on images (B, C, h, w) and frame by frame on videos.

    SANA's gate is SiLU(G). With one added, a gate whose convolution is zero is one in every precision; with `identity` that is
    how it starts, and the convolution of U as a single tap, so that at first nothing changes.
    """

    def __init__(self, channels: int, *, identity: bool = True) -> None:
        super().__init__()
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.gate = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        if identity:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)
            nn.init.dirac_(self.value.weight, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self._gated, x)

    def _gated(self, image: Tensor) -> Tensor:
        value: Tensor = self.value(image)
        return value * (1 + F.silu(self.gate(image)))


class MixFFN(Design):
    """Output(GatedConv(Hidden(X))): a convolution over the hidden channels of image tokens; other tokens stay as they are."""

    name, kind = "mix-ffn", "feed_forward"

    class Options(Frozen):
        """The options of Mix-FFN.

        Attributes:
            identity: start as the teacher's network.
        """

        identity: bool = True

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        if site.grid_dims is not None and site.grid_dims not in GRID_DIMS:
            return Verdict(False, f"the grid has {site.grid_dims} dimensions")
        return Verdict(True, "a convolution over its hidden channels")

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.conv = GatedConv(site.channels["before_output"], identity=options.identity)

    def taps(self) -> tuple[Tap, ...]:
        return (Tap("before_output", self.conv),)

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        """List two convolutions of C hidden channels, 18 C N FLOPs each."""
        return (Product(math.prod(grid), site.channels["before_output"], 9),) * 2
