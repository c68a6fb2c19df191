"""HunyuanVideo: videos and text in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edit_compile.adapters.family import VAE_SCALE, DiffusionFamily, Extent, InputSizes, frames_in_tokens

_FRAMES = 129  # of the pipeline's videos
_SIZES = ((544, 960), (720, 1280))  # pixels
_TEXT_TOKENS = 256


class HunyuanVideo(DiffusionFamily):
    """The transformer of diffusers' HunyuanVideoPipeline. Latents are (B, C, T, H, W)."""

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        config = model.config
        inputs = {
            "hidden_states": self.random_latents(model, sizes),
            "timestep": sizes.integers(),
            "encoder_hidden_states": sizes.floats(sizes.text, config.text_embed_dim),
            "encoder_attention_mask": torch.ones_like(sizes.floats(sizes.text), dtype=torch.bool),
            "pooled_projections": sizes.floats(config.pooled_projection_dim),
            "return_dict": False,
        }
        return inputs | ({"guidance": sizes.floats()} if config.guidance_embeds else {})

    def random_latents(self, model: Any, sizes: InputSizes) -> Tensor:
        """Make the latents (B, C, T, H, W)."""
        patch = model.config.patch_size
        return sizes.floats(model.config.in_channels, model.config.patch_size_t * sizes.frames, patch * sizes.rows, patch * sizes.columns)

    def default_frames(self, model: Any) -> int:
        return _FRAMES

    def token_frames(self, model: Any, frames: int) -> int | None:
        return frames_in_tokens(frames, int(model.config.patch_size_t))

    def default_sizes(self, model: Any) -> tuple[Extent, ...]:
        return tuple((_FRAMES, *size) for size in _SIZES)

    def pixels_per_token(self, model: Any) -> int:
        return int(model.config.patch_size) * VAE_SCALE

    def text_tokens(self, model: Any) -> int:
        return _TEXT_TOKENS

    def example_grid(self, model: Any) -> Extent:
        return 5, 6, 9


FAMILY = HunyuanVideo()
