"""SANA: linear attention of ReLU features, with a convolution in the feed-forward networks (arXiv 2410.10629)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import field_validator
from torch import Tensor

from edit_compile.designs.base import QKV, Design, Tokens, Verdict
from edit_compile.designs.mix_ffn import MixFFN
from edit_compile.designs.ops.linear_attention import masked_linear_attention
from edit_compile.designs.ops.parts import Part
from edit_compile.designs.ops.site_checks import (
    any_attention,
    linear_attention_parts,
    sequence_lengths,
)
from edit_compile.frozen import Frozen
from edit_compile.ir.site import Site


class Sana(Design):
    """y_i = ReLU(Q_i) (sum_j ReLU(K_j)^T V_j) / (ReLU(Q_i) sum_j ReLU(K_j)), j over all tokens, image tokens and others alike.

    The queries, keys and values are the model's own: nothing is added to attention. `MixFFN` comes with it.
    """

    name = "sana"

    class Options(Frozen):
        """SANA's options.

        Attributes:
            mix_ffn: give the feed-forward networks beside the attention a gated 3x3 convolution, too: true, or the options of the
                design `mix-ffn`; false or nothing for none.
        """

        mix_ffn: MixFFN.Options | None = MixFFN.Options()

        @field_validator("mix_ffn", mode="before")
        @classmethod
        def _switched(cls, given: Any) -> Any:
            return (MixFFN.Options() if given else None) if isinstance(given, bool) else given

    @classmethod
    def companions(cls, options: Any) -> tuple[tuple[type[Design], Any], ...]:
        return ((MixFFN, options.mix_ffn),) if options.mix_ffn is not None else ()

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return any_attention(site)

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        return masked_linear_attention(x.query.relu(), x.key.relu(), x.value, x.mask)

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        n = math.prod(grid)
        return linear_attention_parts(site, *sequence_lengths(site, n, n, others))
