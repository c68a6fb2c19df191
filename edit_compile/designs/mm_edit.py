"""MM-EDiT: linear attention between image tokens, softmax wherever other tokens take part, mixed by eta (arXiv 2503.16726)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.designs.base import QKV, Tokens, Verdict
from edit_compile.designs.edit import Edit, compressed_tokens
from edit_compile.designs.ops.linear_attention import attention_with_normaliser, linear_attention, log_weights, matching_heads
from edit_compile.designs.ops.site_checks import (
    has_other_queries,
    joint_attention,
    softmax_attention_flops,
)
from edit_compile.ir.site import Site

START_LOG_WEIGHT = -2.0


class MMEdit(Edit):
    """I image rows, P the others:

    image rows:  eta LinearAttn(Q_I, K_I, V_I) + (1 - eta) SDPA(Q_I, K_P, V_P)
    other rows:  SDPA(Q_P, [K_I; K_P], [V_I; V_P])

    The linear part takes features, by default ReLU, of Q_I and of the compressed K_I; the softmax parts take both as they are. Where
    image queries see other tokens' keys, but these tokens have no queries there, there are image rows alone.
    """

    name = "mm-edit"

    class Options(Edit.Options):
        """EDiT's options, and:

        Attributes:
            eta: the weight of linear attention against softmax over text. "ratio": N_I / (N_I + N_P) (MM-EDiT);
                "exact": by both parts' normalisers; "calibrated": a learned weight per head in the ratio.
            text_keys: whether text queries see "full" or "compressed" image keys.
        """

        eta: Literal["ratio", "exact", "calibrated"] = "exact"
        text_keys: Literal["full", "compressed"] = "full"

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return joint_attention(site)

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.eta, self.scale = options.eta, site.softmax_scale
        self.needs_original = options.compresses and options.text_keys == "full" and has_other_queries(site)
        self.log_weight = nn.Parameter(torch.full((site.heads, 1, 1), START_LOG_WEIGHT)) if self.eta == "calibrated" else None

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        keys = tokens.of_keys.thinned(self.stride)
        key, value = matching_heads(x.query, x.key), matching_heads(x.query, x.value)
        mask_I, mask_P = (keys.image(x.mask, -1), keys.others(x.mask, -1)) if x.mask is not None else (None, None)
        features_I = matching_heads(x.query, self.key_features(keys.image(x.key)))
        image = self._image_rows(tokens.image(x.query), features_I, keys.image(value), mask_I, keys.others(key), keys.others(value), mask_P)
        if tokens.only_image:
            return image
        seen = x.original or x
        all_keys, all_values = matching_heads(x.query, seen.key), matching_heads(x.query, seen.value)
        others = F.scaled_dot_product_attention(tokens.others(x.query), all_keys, all_values, seen.mask, scale=self.scale)
        return tokens.joined(image, others)

    def _image_rows(
        self, q_I: Tensor, features_I: Tensor, v_I: Tensor, mask_I: Tensor | None, k_P: Tensor, v_P: Tensor, mask_P: Tensor | None
    ) -> Tensor:
        linear, mean_denominator = linear_attention(self.query_features(q_I), log_weights(features_I, mask_I), v_I)
        if self.eta == "exact":
            softmax, log_normaliser = attention_with_normaliser(q_I, k_P, v_P, mask_P, self.scale)
            # Both normalisers as logarithms: that of softmax leaves the range of half precision.
            log_linear = (mean_denominator.float() * features_I.shape[2]).clamp(min=torch.finfo(torch.float32).tiny).log()
            eta = torch.sigmoid(log_linear - log_normaliser).to(linear.dtype)
        else:
            softmax = F.scaled_dot_product_attention(q_I, k_P, v_P, mask_P, scale=self.scale)
            eta = self._token_ratio(q_I.shape[2], k_P, mask_P).to(linear.dtype)
        return torch.lerp(softmax, linear, eta.expand_as(linear))

    def _token_ratio(self, image: int, k_P: Tensor, mask_P: Tensor | None) -> Tensor:
        """N_I a / (N_I a + N_P), a = 1 or a head's learned weight; N_I counts uncompressed tokens, N_P unmasked ones."""
        image_tokens = k_P.new_ones((), dtype=torch.float32) * image
        if mask_P is None:
            others = k_P.new_ones((), dtype=torch.float32) * k_P.shape[2]
        else:
            others = (mask_P if mask_P.dtype == torch.bool else mask_P.exp()).float().sum(-1, keepdim=True)
        weight = self.log_weight.float().exp() if self.log_weight is not None else 1
        return image_tokens * weight / (image_tokens * weight + others)

    @classmethod
    def flops(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> int:
        n, m = math.prod(grid), compressed_tokens(site, grid, options)
        seen = (n if options.text_keys == "full" else m) + others
        pairs = others * (n + seen) if has_other_queries(site) else others * n
        return super().flops(site, grid, others, options) + softmax_attention_flops(site, pairs)
