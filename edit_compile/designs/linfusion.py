"""LinFusion: linear attention with a non-linear map of each token on queries and keys (arXiv 2409.02097)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import PositiveInt
from torch import Tensor, nn

from edit_compile.designs.base import QKV, Design, Tap, Tokens, Verdict
from edit_compile.designs.ops.feature_maps import elu_plus_one
from edit_compile.designs.ops.linear_attention import masked_linear_attention
from edit_compile.designs.ops.parts import Part, Product
from edit_compile.designs.ops.site_checks import (
    any_attention,
    linear_attention_parts,
    sequence_lengths,
)
from edit_compile.errors import ConfigError
from edit_compile.frozen import Frozen
from edit_compile.ir.site import Place, Site

_MAPPED: tuple[Place, Place] = ("before_query", "before_key")


class TokenMap(nn.Module):
    """X + Linear(LeakyReLU(LayerNorm(Linear(X)))) (LinFusion) for tokens (B, N, C), each by itself.

    The first Linear reduces the channels `reduction` times, the last restores them; with `identity` it starts at zero.

    Raises:
        ConfigError: `reduction` does not divide the channels.
    """

    def __init__(self, channels: int, reduction: int, *, identity: bool = True) -> None:
        super().__init__()
        if channels % reduction:
            raise ConfigError(f"reduction={reduction} does not divide the {channels} channels of this site")
        self.reduce = nn.Linear(channels, channels // reduction)
        self.norm = nn.LayerNorm(channels // reduction)
        self.activation = nn.LeakyReLU(0.01)
        self.restore = nn.Linear(channels // reduction, channels)
        if identity:
            for parameter in self.restore.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.restore(self.activation(self.norm(self.reduce(x))))
        return x + added


class LinFusion(Design):
    """y_i = Q_i (sum_j K_j^T V_j) / (Q_i sum_j K_j), Q = ELU(Linear(X + MLP(X))) + 1, K alike with a map of its own.

    The maps are the image tokens'. Other tokens, where a site has them, take part in the same attention with ELU + 1 of the
    model's own queries and keys.
    """

    name = "linfusion"

    class Options(Frozen):
        """LinFusion's options.

        Attributes:
            reduction: by how much the first Linear of a map reduces the channels; 1 is LinFusion's own.
            identity: start with maps that add nothing.
        """

        reduction: PositiveInt = 1
        identity: bool = True

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return any_attention(site)

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        query, key = (TokenMap(site.channels[place], options.reduction, identity=options.identity) for place in _MAPPED)
        self.query, self.key = query, key

    def taps(self) -> tuple[Tap, ...]:
        return tuple(Tap(place, module, form="tokens") for place, module in zip(_MAPPED, (self.query, self.key), strict=True))

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        return masked_linear_attention(elu_plus_one(x.query), elu_plus_one(x.key), x.value, x.mask)

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        """List the two Linears of each of two maps, and linear attention over all tokens."""
        n = math.prod(grid)
        widths = [(site.channels[place], site.channels[place] // int(options.reduction)) for place in _MAPPED]
        maps = tuple(part for c, hidden in widths for part in (Product(n, hidden, c), Product(n, c, hidden)))
        return maps + linear_attention_parts(site, *sequence_lengths(site, n, n, others))
