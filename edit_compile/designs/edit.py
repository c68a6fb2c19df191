"""EDiT: linear compressed attention between image tokens (arXiv 2503.16726)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from edit_compile.designs.base import QKV, Design, Tap, Tokens, Verdict
from edit_compile.designs.ops.conv_modules import ConvFusion, SpatialCompressor
from edit_compile.designs.ops.linear_attention import linear_attention, log_weights, matching_heads
from edit_compile.designs.ops.site_checks import first_problem
from edit_compile.frozen import Frozen
from edit_compile.ir.site import Place, Site
from edit_compile.ir.tokens import TokenKind

Projection = Literal["conv-fusion", "compressor", "plain"]
STRIDE = 2  # of the compressor, each way


class Edit(Design):
    """Q = ReLU(Linear(ConvFusion(X))), K and V compressed, y_i = Q_i (sum K_j^T V_j) / (Q_i sum K_j)."""

    name = "edit"

    class Options(Frozen):
        """EDiT's options. The defaults are the paper's where it states one; the README names the others.

        Attributes:
            reduction: by how much ConvFusion's 3x3 convolution reduces the channels.
            query: "conv-fusion" (EDiT) or "plain", the model's own projection.
            key, value: "compressor" (EDiT), "conv-fusion" or "plain"; both compressed or neither, so that they stay paired.
            identity: start as close to the teacher as possible: ConvFusion adds nothing, the compressor samples.
        """

        reduction: PositiveInt = 4
        query: Literal["conv-fusion", "plain"] = "conv-fusion"
        key: Projection = "compressor"
        value: Projection = "compressor"
        identity: bool = True

        @model_validator(mode="after")
        def _paired(self) -> Edit.Options:
            if (self.key == "compressor") != (self.value == "compressor"):
                raise ValueError(f"key={self.key!r} and value={self.value!r}: compress both or neither, keys and values are paired")
            return self

        @property
        def compresses(self) -> bool:
            return self.key == "compressor"

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        problem = first_problem(site)
        if problem is None and not site.keys.only(TokenKind.IMAGE):
            problem = "it is for attention between image tokens alone"
        return Verdict(problem is None, problem or "attention between image tokens")

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.query = _module(options.query, "query", site, options)
        self.key = _module(options.key, "key", site, options)
        self.value = _module(options.value, "value", site, options)

    def taps(self) -> tuple[Tap, ...]:
        return tuple(self._taps())

    def _taps(self) -> Iterator[Tap]:
        places: tuple[tuple[Place, Place, nn.Module | None], ...] = (
            ("before_query", "after_query", self.query),
            ("before_key", "after_key", self.key),
            ("before_value", "after_value", self.value),
        )
        for before, after, module in places:
            if isinstance(module, SpatialCompressor):
                yield Tap(after, module, module.stride)
            elif module is not None:
                yield Tap(before, module)

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        key, value = matching_heads(x.query, x.key), matching_heads(x.query, x.value)
        y_BHND, _ = linear_attention(x.query.relu(), log_weights(key.relu(), x.mask), value)
        return y_BHND

    @classmethod
    def flops(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> int:
        n, m = math.prod(grid), compressed_tokens(grid, options)
        linear = 2 * site.heads * site.head_dim * (m * site.value_dim + n * site.value_dim + n)
        return linear + sum(_tap_flops(getattr(options, name), name, site, n, m, options) for name in ("query", "key", "value"))


def compressed_tokens(grid: Sequence[int], options: Any) -> int:
    """Count the keys that stand for the image tokens of a grid."""
    return math.prod(-(-n // STRIDE) for n in grid) if options.compresses else math.prod(grid)


def _module(kind: Projection, name: str, site: Site, options: Any) -> nn.Module | None:
    if kind == "conv-fusion":
        return ConvFusion(site.channels[f"before_{name}"], options.reduction, identity=options.identity)
    return SpatialCompressor(site.channels[f"after_{name}"], stride=STRIDE, identity=options.identity) if kind == "compressor" else None


def _tap_flops(kind: Projection, name: str, site: Site, n: int, m: int, options: Any) -> int:
    """20 C^2 N / reduction of ConvFusion, 18 C M of the compressor."""
    if kind == "conv-fusion":
        c = site.channels[f"before_{name}"]
        return 20 * n * c * (c // int(options.reduction))
    return 18 * m * site.channels[f"after_{name}"] if kind == "compressor" else 0
