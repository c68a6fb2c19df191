"""Attention taken out: what a model costs whose image tokens do not look at each other. A bound for designs, not one to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from edit_compile.designs.base import QKV, Design, Tokens, Verdict
from edit_compile.designs.ops.linear_attention import matching_heads
from edit_compile.designs.ops.parts import Part
from edit_compile.designs.ops.site_checks import any_attention
from edit_compile.ir.site import Site

NEXT_TO_NOTHING = 2.0**-12


class NoAttention(Design):
    """y_i = v_i + 2^-12 mean(q_i k_i), where the token i has a key: one pass over the queries, keys and values.

    Each of their numbers has a part in the result, so that neither torch.compile nor a pass drops projections, norms or rotations. Of
    tokens that have a key and no query, the mean of v k is in every y_i; of those with a query alone, that of the others is.
    """

    name = "no-attention"

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return any_attention(site)

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        key, value, keys = matching_heads(x.query, x.key), matching_heads(x.query, x.value), tokens.of_keys
        if tokens.kinds == keys.kinds:
            return passed(x.query, key, value)
        image = passed(tokens.image(x.query), keys.image(key), keys.image(value))
        seen = passed(keys.others(key), keys.others(key), keys.others(value)).mean(2, keepdim=True)
        image = image + NEXT_TO_NOTHING * seen
        return image if tokens.only_image else tokens.joined(image, tokens.others(x.query).mean(-1, keepdim=True) + seen)

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        return ()


def passed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return values (B, H, N, E) with next to nothing of the queries and keys (B, H, N, D) of the same tokens in them."""
    if query.shape[-1] == value.shape[-1]:
        return value.addcmul(query, key, value=NEXT_TO_NOTHING)
    return value + NEXT_TO_NOTHING * (query * key).mean(-1, keepdim=True)
