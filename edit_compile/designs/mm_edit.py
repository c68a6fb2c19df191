"""MM-EDiT: linear attention between image tokens, softmax wherever other tokens take part, mixed by eta (arXiv 2503.16726)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs.base import Additions, Design
from edit_compile.designs.edit import projection_module
from edit_compile.designs.ops.linear_attention import attention_with_normaliser, linear_attention, log_weights, matching_heads
from edit_compile.designs.ops.token_spans import image_span

START_LOG_WEIGHT = -2.0


class MMEdit(nn.Module):
    """I image rows, P the others:

    image rows:  eta LinearAttn(Q_I, K_I, V_I) + (1 - eta) SDPA(Q_I, K_P, V_P)
    other rows:  SDPA(Q_P, [K_I; K_P], [V_I; V_P])

    The linear part takes ReLU of Q_I and of the compressed K_I; the softmax parts take both as they are.

    Args:
        channels: of the query's, the key's and the value's module, by name.
        heads: of the query.
        head_channels: of a query head; the softmax scale is its inverse root unless `scale` is given.
        before, after: numbers of tokens before and after the image, one of which may be None (see `segments`).
    """

    def __init__(
        self,
        config: LinearizeConfig,
        channels: dict[str, int],
        *,
        heads: int,
        head_channels: int,
        scale: float | None,
        before: int | None,
        after: int | None,
    ) -> None:
        super().__init__()
        self.query = projection_module(config.query, channels["query"], config)
        self.key = projection_module(config.key, channels["key"], config)
        self.value = projection_module(config.value, channels["value"], config)
        self.eta = config.eta
        self.scale = head_channels**-0.5 if scale is None else scale
        self.before, self.after = before, after
        self.log_weight = nn.Parameter(torch.full((heads, 1, 1), START_LOG_WEIGHT)) if self.eta == "calibrated" else None

    def forward(
        self,
        q_BHLD: Tensor,
        k_BHMD: Tensor,
        v_BHMD: Tensor,
        grid_hw: Tensor,
        mask: Tensor | None = None,
        full: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """Attention over all rows, (B, H, L, D).

        Args:
            q_BHLD: queries of all L tokens, in the model's order.
            k_BHMD, v_BHMD: keys and values of all tokens, the image's compressed (M of them, same order).
            mask: by key, (..., 1, M), boolean or additive.
            full: uncompressed keys, values and mask, for the other rows to attend to; None: they see the compressed.
        """
        k_BHMD, v_BHMD = matching_heads(q_BHLD, k_BHMD), matching_heads(q_BHLD, v_BHMD)
        length = q_BHLD.shape[2]
        start, stop = image_span(length, grid_hw, self.before, self.after)
        rest = length - stop
        k_I, k_P = _image_and_others(k_BHMD, 2, start, rest)
        v_I, v_P = _image_and_others(v_BHMD, 2, start, rest)
        mask_I, mask_P = _image_and_others(mask, -1, start, rest) if mask is not None else (None, None)
        q_I = q_BHLD.narrow(2, start, stop - start)
        image = self._image_rows(q_I, k_I, v_I, mask_I, k_P, v_P, mask_P)

        q_P = _others(q_BHLD, 2, start, rest)
        keys, values, key_mask = full or (k_BHMD, v_BHMD, mask)
        keys, values = matching_heads(q_BHLD, keys), matching_heads(q_BHLD, values)
        others = F.scaled_dot_product_attention(q_P, keys, values, key_mask, scale=self.scale)
        return torch.cat([others.narrow(2, 0, start), image, others.narrow(2, start, rest)], 2)

    def _image_rows(
        self, q_I: Tensor, k_I: Tensor, v_I: Tensor, mask_I: Tensor | None, k_P: Tensor, v_P: Tensor, mask_P: Tensor | None
    ) -> Tensor:
        linear, mean_denominator = linear_attention(q_I.relu(), log_weights(k_I.relu(), mask_I), v_I)
        if self.eta == "exact":
            softmax, log_normaliser = attention_with_normaliser(q_I, k_P, v_P, mask_P, self.scale)
            # Both normalisers as logarithms: that of softmax leaves the range of half precision.
            log_linear = (mean_denominator.float() * k_I.shape[2]).clamp(min=torch.finfo(torch.float32).tiny).log()
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


def _others(x: Tensor, dim: int, start: int, rest: int) -> Tensor:
    length = x.shape[dim]
    return torch.cat([x.narrow(dim, 0, start), x.narrow(dim, length - rest, rest)], dim)


def _image_and_others(x: Tensor, dim: int, start: int, rest: int) -> tuple[Tensor, Tensor]:
    return x.narrow(dim, start, x.shape[dim] - start - rest), _others(x, dim, start, rest)


def _build(additions: Additions, config: LinearizeConfig) -> MMEdit:
    return MMEdit(
        config,
        additions.channels,
        heads=additions.heads,
        head_channels=additions.head_channels,
        scale=additions.scale,
        before=additions.before,
        after=additions.after,
    )


MM_EDIT = Design("mm-edit", joint=True, build=_build)
