"""Latents as tokens, for models whose pipelines cut them into patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from edit_compile.adapters.family import VAE_SCALE, Extent, Size, TextToImageFamily


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


class PackedFamily(TextToImageFamily):
    """A family whose tokens are 2 x 2 latents of the VAE.

    Attributes:
        packed: how many latents, each way, become a token in the transformer's pipeline; 1 if the latents are patches already.
    """

    packed: ClassVar[int] = 2

    def pixels_per_token(self, model: Any) -> int:
        return self.latent_patch(model) * VAE_SCALE

    def latent_patch(self, model: Any) -> int:
        return 2  # the model's own patch_size may be 1: the pipeline packs

    def latents(self, inputs: Mapping[str, Any], grid: Extent) -> Tensor:
        return unpack(inputs["hidden_states"], grid, self.packed)

    def unpack_samples(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        height, width = size
        step = 2 * pipe.vae_scale_factor
        return unpack(latents, (height // step, width // step), self.packed)
