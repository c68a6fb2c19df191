"""What a mask by key does: it adds to the scores of softmax attention, and so multiplies the weights exp(score) of keys."""

from __future__ import annotations

import torch
from torch import Tensor

NO_WEIGHT = torch.finfo(torch.float32).min  # the logarithm of no weight at all, which is finite: its gradient is not NaN


def at_least_float32(x: Tensor) -> torch.dtype:
    """Return the type to sum in: float32 for half precision, else the tensor's own."""
    return torch.promote_types(x.dtype, torch.float32)


def as_key_mask(mask: Tensor, key: Tensor) -> Tensor:
    """View a mask that broadcasts to (B, H, L, M) with all four dimensions, and all M keys (B, G, M, D) in the last one."""
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask.expand(*mask.shape[:3], key.shape[2])


def key_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to the scores, in its own shape: zero or minus infinity if it is boolean."""
    return torch.where(mask, 0.0, float("-inf")).to(dtype) if mask.dtype == torch.bool else mask.to(dtype)


def key_weights(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return by what a mask (..., 1, M) multiplies the weights of keys, as (..., M, 1), and a logarithm that is to be added, (..., 1, 1).

    The largest is 1 unless all keys are masked: what a mask adds to all scores alike is in the logarithm, and no number is too large.
    """
    bias = key_bias(mask, dtype)
    top = bias.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    return (bias - top).exp().transpose(-1, -2), top
