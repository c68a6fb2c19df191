"""Latents as tokens, for models whose pipelines cut them into patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edit_compile.adapters.family import Extent


def pack(x_BCHW: Tensor, patch: int) -> Tensor:
    """Cut latents (B, C, patch * rows, patch * columns) into tokens (B, rows * columns, C * patch^2)."""
    patches: Tensor = F.pixel_unshuffle(x_BCHW, patch)
    return patches.flatten(2).transpose(1, 2)


def unpack(tokens_BNC: Tensor, grid: Extent, patch: int) -> Tensor:
    """Undo `pack`, given (rows, columns)."""
    patches = tokens_BNC.transpose(1, 2)
    latents: Tensor = F.pixel_shuffle(patches.reshape(*patches.shape[:2], *grid), patch)
    return latents


def position_ids(rows: int, columns: int, before: int, after: int) -> Tensor:
    """Number a grid row by row: (rows * columns, before + 2 + after) float32, zeros round row and column."""
    row, column = torch.meshgrid(torch.arange(float(rows)), torch.arange(float(columns)), indexing="ij")
    zero = torch.zeros_like(row)
    return torch.stack([*[zero] * before, row, column, *[zero] * after], -1).flatten(0, 1)
