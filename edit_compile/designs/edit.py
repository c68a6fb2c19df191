"""EDiT: linear compressed attention between image tokens (arXiv 2503.16726)."""

from __future__ import annotations

from torch import Tensor, nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs.base import Additions, Design
from edit_compile.designs.ops.conv_modules import ConvFusion, SpatialCompressor
from edit_compile.designs.ops.linear_attention import linear_attention, log_weights, matching_heads


def projection_module(kind: str, channels: int, config: LinearizeConfig) -> nn.Module | None:
    """What one of query, key and value gets: ConvFusion, the compressor, or nothing."""
    if kind == "conv-fusion":
        return ConvFusion(channels, config.reduction, identity=config.identity)
    return SpatialCompressor(channels, identity=config.identity) if kind == "compressor" else None


class Edit(nn.Module):
    """Q = ReLU(Linear(ConvFusion(X))), K and V compressed, y_i = Q_i (sum K_j^T V_j) / (Q_i sum K_j).

    The site's graph calls `query`, `key` and `value` where they belong and this module in the place of softmax attention.

    Args:
        channels: of the query's, the key's and the value's module, by name.
    """

    def __init__(self, config: LinearizeConfig, channels: dict[str, int]) -> None:
        super().__init__()
        self.query = projection_module(config.query, channels["query"], config)
        self.key = projection_module(config.key, channels["key"], config)
        self.value = projection_module(config.value, channels["value"], config)

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, mask: Tensor | None = None) -> Tensor:
        """Heads-first tensors of image tokens; `mask` (..., 1, M) is boolean or additive, as for softmax attention."""
        k_BHMD, v_BHMD = matching_heads(q_BHND, k_BHMD), matching_heads(q_BHND, v_BHMD)
        y_BHND, _ = linear_attention(q_BHND.relu(), log_weights(k_BHMD.relu(), mask), v_BHMD)
        return y_BHND


def _build(additions: Additions, config: LinearizeConfig) -> Edit:
    return Edit(config, additions.channels)


EDIT = Design("edit", joint=False, build=_build)
