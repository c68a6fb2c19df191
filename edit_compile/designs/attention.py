"""The attention arithmetic that linear designs share: plain functions on heads-first tensors.

Shape suffixes: B batch, H heads, N queries, M (compressed) image keys, P prompt keys, D channels of a head.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST_DENOMINATOR = 1e-6


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
