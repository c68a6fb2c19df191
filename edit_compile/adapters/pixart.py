"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from edit_compile.adapters.family import InputSizes, Size, TextToImageFamily


class PixArt(TextToImageFamily):
    """The DiT with cross-attention to text of diffusers' PixArt pipelines. Some models also predict the variance."""

    max_text_tokens = 300
    pipeline_options: ClassVar[Mapping[str, Any]] = {"use_resolution_binning": False, "clean_caption": False}

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        added = _added(model, resolution=sizes.floats(2), aspect_ratio=sizes.floats(1))
        return {
            "hidden_states": self.random_latents(model, sizes),
            "encoder_hidden_states": sizes.floats(sizes.text, model.config.caption_channels),
            "timestep": sizes.integers(),
            "added_cond_kwargs": added,
            "encoder_attention_mask": torch.ones_like(sizes.floats(sizes.text)),
            "return_dict": False,
        }

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        tokens, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask.float()}

    def other_conditions(self, model: Any, size: Size, batch: int) -> dict[str, Any]:
        height, width = size
        resolution = torch.tensor([[height, width]]).float().repeat(batch, 1)
        return {"added_cond_kwargs": _added(model, resolution=resolution, aspect_ratio=torch.full((batch, 1), height / width))}


def _added(model: Any, *, resolution: Tensor, aspect_ratio: Tensor) -> dict[str, Tensor | None]:
    """Return the image's size (B, 2) and aspect ratio (B, 1), which only some PixArt-alpha models are told."""
    if getattr(model, "use_additional_conditions", False):
        return {"resolution": resolution, "aspect_ratio": aspect_ratio}
    return {"resolution": None, "aspect_ratio": None}


FAMILY = PixArt()
