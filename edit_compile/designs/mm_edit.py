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
from edit_compile.designs.ops.key_masks import key_weights
from edit_compile.designs.ops.linear_attention import attention_with_normaliser, matching_heads
from edit_compile.designs.ops.parts import Part
from edit_compile.designs.ops.site_checks import (
    has_other_queries,
    joint_attention,
    softmax_attention,
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
        text_keys: Literal["full", "compressed"] = "compressed"

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        return joint_attention(site)

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.eta, self.scale = options.eta, site.softmax_scale
        self.needs_original = options.compresses and options.text_keys == "full" and has_other_queries(site)
        self.log_weight = nn.Parameter(torch.full((site.heads, 1, 1), START_LOG_WEIGHT)) if self.eta == "calibrated" else None

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        image = self._image_rows(x, tokens)
        if tokens.only_image:
            return image
        seen = x.original or x
        all_keys, all_values = matching_heads(x.query, seen.key), matching_heads(x.query, seen.value)
        others = F.scaled_dot_product_attention(tokens.others(x.query), all_keys, all_values, seen.mask, scale=self.scale)
        return tokens.joined(image, others)

    def _image_rows(self, x: QKV, tokens: Tokens) -> Tensor:
        keys, q_I = tokens.of_keys.thinned(self.stride), tokens.image(x.query)
        key, value = matching_heads(x.query, x.key), matching_heads(x.query, x.value)
        mask_I, mask_P = (keys.image(x.mask, -1), keys.others(x.mask, -1)) if x.mask is not None else (None, None)
        linear, log_linear = self.linear_attention(q_I, keys.image(x.key), keys.image(x.value), mask_I)
        if self.eta == "exact":
            softmax, log_softmax = attention_with_normaliser(q_I, keys.others(key), keys.others(value), mask_P, self.scale)
            eta = torch.sigmoid(log_linear - log_softmax)
        else:
            softmax = F.scaled_dot_product_attention(q_I, keys.others(key), keys.others(value), mask_P, scale=self.scale)
            eta = self._token_ratio(q_I, keys, x.mask)
        return torch.lerp(softmax, linear, eta.to(linear.dtype).expand_as(linear))

    def _token_ratio(self, q_I: Tensor, keys: Tokens, mask: Tensor | None) -> Tensor:
        """Return N_I a / (N_I a + N_P), a = 1 or a head's learned weight; N_I counts uncompressed tokens, both unmasked ones."""
        counts = q_I.new_ones((1, 1, sum(keys.lengths), 1), dtype=torch.float32)
        if mask is not None:
            counts, _ = key_weights(mask, torch.float32)
        image, others = q_I.shape[2] * keys.image(counts).mean(2, keepdim=True), keys.others(counts).sum(2, keepdim=True)
        if self.log_weight is not None:
            image = image * self.log_weight.float().exp()
        return image / (image + others).clamp(min=torch.finfo(torch.float32).tiny)

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        n, m = math.prod(grid), compressed_tokens(site, grid, options)
        seen = (n if options.text_keys == "full" else m) + others
        softmax = ((n, others), (others, seen)) if has_other_queries(site) else ((n, others),)
        return super().parts(site, grid, others, options) + tuple(softmax_attention(site, *lengths) for lengths in softmax)
