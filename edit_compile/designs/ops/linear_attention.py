"""The attention arithmetic that linear designs share: plain functions on heads-first tensors.

Shape suffixes: B batch, H heads, N queries, M (compressed) image keys, P prompt keys, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_DENOMINATOR = 1e-6
NO_WEIGHT = torch.finfo(torch.float32).min  # the logarithm of no weight at all, which is finite: its gradient is not NaN


def linear_attention(q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> tuple[Tensor, Tensor]:
    """y_i = Q_i (sum_j K_j^T V_j) / (Q_i sum_j K_j) for non-negative Q and K (EDiT, arXiv 2503.16726).

    Sums over keys are means: the count cancels in y and keeps half precision in range; it is shared between K
    and V as its square root so that neither underflows. Matrix products accumulate in float32. The denominator
    is bounded below, so that a query orthogonal to every key gives zero, not NaN.

    Returns:
        y, (B, H, N, D), and the mean denominator (Q_i sum_j K_j) / M, (B, H, N, 1), both in Q's dtype.
    """
    count = k_BHMD.shape[-2]
    scale = count**-0.5
    summary_BHDD = (k_BHMD * scale).transpose(-1, -2) @ (v_BHMD * scale)
    mean_BHD1 = k_BHMD.mean(-2).unsqueeze(-1)
    denominator_BHN1 = q_BHND @ mean_BHD1
    return (q_BHND @ summary_BHDD) / denominator_BHN1.clamp(min=SMALLEST_DENOMINATOR), denominator_BHN1


def log_weights(k_BHMD: Tensor, mask: Tensor | None) -> Tensor:
    """Weight keys by a mask by key, (..., 1, M): what it adds to a logit, as a logarithm, multiplies a key of linear attention."""
    if mask is None:
        return k_BHMD
    weights = mask if mask.dtype == torch.bool else mask.exp()
    return k_BHMD * weights.transpose(-1, -2).to(k_BHMD.dtype)


def matching_heads(q_BHND: Tensor, k_BGMD: Tensor) -> Tensor:
    """Repeat keys or values so that every query head has one: each of G groups serves H / G heads (grouped-query attention)."""
    heads, groups = q_BHND.shape[1], k_BGMD.shape[1]
    return k_BGMD if heads == groups else k_BGMD.repeat_interleave(heads // groups, 1)


def masked_linear_attention(q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None) -> Tensor:
    """Compute linear attention of non-negative features over all keys, each as far as a mask by key lets it count, (B, H, N, E)."""
    key, value = matching_heads(q_BHND, k_BGMD), matching_heads(q_BHND, v_BGME)
    y_BHNE, _ = linear_attention(q_BHND, log_weights(key, mask), value)
    return y_BHNE


def attention_with_normaliser(q_BHND: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax attention and the logarithm of its normaliser, log sum_j exp(q_i . k_j * scale), (B, H, N, 1) in float32 or higher.

    Of no keys at all, as padding to a multiple has where nothing is left to pad, the result is zero and its weight none.
    """
    scores_BHNP = (q_BHND * scale) @ k_BHPD.transpose(-1, -2)
    if mask is not None:
        scores_BHNP = scores_BHNP.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores_BHNP + mask
    scores_BHNP = scores_BHNP.to(at_least_float32(scores_BHNP))
    if k_BHPD.shape[2] == 0:
        shape = q_BHND.shape[:-1]
        return v_BHPD.new_zeros((*shape, v_BHPD.shape[-1])), scores_BHNP.new_full((*shape, 1), NO_WEIGHT)
    return softmax_with_normaliser(scores_BHNP, v_BHPD)


def softmax_with_normaliser(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Weight values (..., M, E) by the softmax of scores (..., N, M), and return the logarithm of its normaliser, (..., N, 1).

    Where every key is masked, the result is zero and its weight none.
    """
    top = scores.detach().amax(-1, keepdim=True).clamp(min=NO_WEIGHT)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)  # at least 1, that of the largest score, unless every key is masked
    y = (weights / torch.where(total == 0, 1, total)).to(v.dtype) @ v  # shares, not sums, which leave the range of float16
    return y, top + total.clamp(min=torch.finfo(torch.float32).tiny).log()


def at_least_float32(x: Tensor) -> torch.dtype:
    """Return the type to sum in: float32 for half precision, else the tensor's own."""
    return torch.promote_types(x.dtype, torch.float32)
