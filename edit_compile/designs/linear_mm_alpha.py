"""Linear MM-DiT-alpha: one linear attention over image tokens and others (compared with MM-EDiT in arXiv 2503.16726)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from edit_compile.designs.base import QKV, Tokens, Verdict
from edit_compile.designs.edit import Edit, compressed_tokens, features_parts, tap_parts
from edit_compile.designs.ops.linear_attention import masked_linear_attention
from edit_compile.designs.ops.parts import Part
from edit_compile.designs.ops.site_checks import (
    joint_attention,
    linear_attention_parts,
    sequence_lengths,
)
from edit_compile.ir.site import Site


class LinearMMAlpha(Edit):
    """y_i = Q_i (sum_j K_j^T V_j) / (Q_i sum_j K_j) for all queries i, over the compressed image keys and all other keys j.

    Of image tokens Q = ReLU(Linear(ConvFusion(X))), and K and V are compressed, as in EDiT; of other tokens Q and K are ReLU of
    the model's own. There is no softmax and no eta. Balance is ours: untrained, demo/mm-dit's error is 0.29 with it, 0.34 without
    (benchmarks/starts.py).
    """

    name = "linear-mm-alpha"

    class Options(Edit.Options):
        """EDiT's options, and:

        Attributes:
            balance: a compressed image key counts as often as there are image tokens for which it stands; otherwise once, as
                another token's.
        """

        balance: bool = True

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return joint_attention(site)

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.balances = options.balance and options.compresses

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        key = self.key_features(x.key)
        if self.balances:
            counts = tokens.of_keys.counts(self.stride, key)
            key = key * (counts / counts.amax()).to(key.dtype).unsqueeze(-1)  # only their ratios matter
        return masked_linear_attention(self.query_features(x.query), key, x.value, x.mask)

    @property
    def kernel_case(self) -> None:
        """Have no kernel: it would not know of the weights of keys."""

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        queries, keys = sequence_lengths(site, math.prod(grid), compressed_tokens(site, grid, options), others)
        return linear_attention_parts(site, queries, keys) + tap_parts(site, grid, options) + features_parts(site, queries, keys, options)
