"""The attention arithmetic that designs share: plain functions on heads-first tensors.

Results are in V's type. Beside them some return the logarithm of the normaliser that they divide by, in float32 or higher, by which
parts are weighed against each other.

Shape suffixes: B batch, H heads, N queries, M keys, D and E channels of a head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from edit_compile.designs.ops.key_masks import NO_WEIGHT, at_least_float32, key_bias, key_weights
from edit_compile.torch_internals import fused_attention, has_autocast


def linear_attention(q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute y_i = Q_i (sum_j K_j^T V_j) / (Q_i sum_j K_j) for non-negative Q and K (EDiT, arXiv 2503.16726).

    That is y_i = sum_d s_id u_d, with u_d the mean of V that channel d of K weights, and s_id = Q_id sum_j K_jd / (Q_i sum_j K_j), the
    share of a channel. Both are means, so that in half precision nothing leaves the range however many keys there are, and neither a
    channel's scale nor a query's has an effect, however small or large. Sums and shares are float32, both products V's type.

    Args:
        mask: by key, (B or 1, H or 1, 1, M).

    Returns:
        y, (B, H, N, E), zero for a query orthogonal to every key; and log(Q_i sum_j K_j), (B, H, N, 1).
    """
    count, dtype, log_scale = k_BHMD.shape[2], at_least_float32(k_BHMD), None
    if mask is not None:
        weights, log_scale = key_weights(mask, dtype)
        k_BHMD = k_BHMD * weights.to(k_BHMD.dtype)
    mean_BH1D = k_BHMD.mean(2, keepdim=True, dtype=dtype)
    top_BH11 = mean_BH1D.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    root = count**-0.5  # of the count, on both sides: neither K nor V underflows
    summary_BHDE = (k_BHMD * (root / or_one(mean_BH1D))).to(v_BHME.dtype).transpose(-1, -2) @ (v_BHME * root)
    parts_BHND = q_BHND * (mean_BH1D / top_BH11)
    total_BHN1 = parts_BHND.sum(-1, keepdim=True)
    y_BHNE = (parts_BHND / or_one(total_BHN1)).to(v_BHME.dtype) @ summary_BHDE
    log_normaliser = or_one(total_BHN1).log() + (top_BH11 * count).log()
    if log_scale is not None:
        log_normaliser = log_normaliser + log_scale
    return y_BHNE, torch.where(_is_some(total_BHN1), log_normaliser, NO_WEIGHT)


def _is_some(x: Tensor) -> Tensor:
    """Say where there is something to divide by."""
    return x >= torch.finfo(x.dtype).tiny


def or_one(x: Tensor) -> Tensor:
    """Replace what is nothing to divide by with one."""
    return torch.where(_is_some(x), x, 1)


def matching_heads(q_BHND: Tensor, k_BGMD: Tensor) -> Tensor:
    """Repeat keys or values so that every query head has one: each of G groups serves H / G heads (grouped-query attention)."""
    heads, groups = q_BHND.shape[1], k_BGMD.shape[1]
    return k_BGMD if heads == groups else k_BGMD.repeat_interleave(heads // groups, 1)


def masked_linear_attention(q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None) -> Tensor:
    """Compute linear attention of non-negative features over all keys, each as far as a mask by key lets it count, (B, H, N, E)."""
    y_BHNE, _ = linear_attention(q_BHND, matching_heads(q_BHND, k_BGMD), matching_heads(q_BHND, v_BGME), mask)
    return y_BHNE


def attention_with_normaliser(q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax attention, (B, H, N, E), and the logarithm of its normaliser, log sum_j exp(q_i . k_j * scale), (B, H, N, 1).

    Of no keys at all, as padding to a multiple has where nothing is left to pad, the result is zero and its weight none; so it is where
    every key is masked. Without gradients torch's fused kernels compute both where they can, and no scores, (B, H, N, M), are in memory.
    """
    if k_BHMD.shape[2] == 0:
        shape = q_BHND.shape[:-1]
        return v_BHME.new_zeros((*shape, v_BHME.shape[-1])), q_BHND.new_full((*shape, 1), NO_WEIGHT, dtype=at_least_float32(q_BHND))
    if mask is None or mask.dtype in (torch.bool, q_BHND.dtype):
        bias = None if mask is None else key_bias(mask, q_BHND.dtype)
        found = fused_attention(q_BHND, k_BHMD, v_BHME, bias, scale)
        if found is not None:
            return found if bias is None else _where_some_key_counts(*found, bias)
    scores_BHNM = exact_scores(q_BHND, k_BHMD, scale)
    return softmax_with_normaliser(scores_BHNM if mask is None else scores_BHNM + key_bias(mask, scores_BHNM.dtype), v_BHME)


def _where_some_key_counts(y: Tensor, log_normaliser: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    some = bias.amax(-1, keepdim=True) > float("-inf")
    return torch.where(some, y, 0), torch.where(some, log_normaliser, NO_WEIGHT)


def exact_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute the scores (..., N, M) of queries and keys in float32 or higher, also under autocast.

    As the kernels of softmax attention do: rounded to half precision, scores would be wrong by a share of their size, not of their
    differences, which alone count.
    """
    dtype = at_least_float32(q)
    with _no_autocast(q.device.type):
        return (q.to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    casts = has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if casts else nullcontext()


def softmax_with_normaliser(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Weight values (..., M, E) by the softmax of scores (..., N, M), and return the logarithm of its normaliser, (..., N, 1).

    Where every key is masked, the result is zero and its weight none.
    """
    top = scores.detach().amax(-1, keepdim=True).clamp(min=NO_WEIGHT)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)  # at least 1, that of the largest score, unless every key is masked
    y = (weights / torch.where(total == 0, 1, total)).to(v.dtype) @ v  # shares, not sums, which leave the range of float16
    return y, top + total.clamp(min=torch.finfo(torch.float32).tiny).log()
