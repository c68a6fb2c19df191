"""Wan 2.x, and the demo video model, which has its structure: videos, conditioned on text through cross-attention.

The demo model works on pixels, and is given their positions as further channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edit_compile.adapters.family import RGB, VAE_FRAMES, VAE_SCALE, Extent, InputSizes, TextToImageFamily, frames_in_tokens, is_pixel_space
from edit_compile.demo import models as demo
from edit_compile.demo import motion

_FRAMES = 81  # of the pipeline's videos
_SIZES = ((480, 832), (720, 1280))  # pixels
_CLIP_TOKENS = 257  # of the image that some models continue


class Wan(TextToImageFamily):
    """The DiT of diffusers' WanPipeline. Latents are (B, C, T, H, W)."""

    max_text_tokens = 512

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        image_channels = model.config.image_dim
        image = {} if image_channels is None else {"encoder_hidden_states_image": sizes.floats(_CLIP_TOKENS, image_channels)}
        return {
            "hidden_states": self.random_latents(model, sizes),
            "timestep": sizes.integers(),
            "encoder_hidden_states": sizes.floats(sizes.text, model.config.text_dim),
            "return_dict": False,
            **image,
        }

    def random_latents(self, model: Any, sizes: InputSizes) -> Tensor:
        """Make the latents (B, C, T, H, W)."""
        frames, rows, columns = model.config.patch_size
        return sizes.floats(model.config.in_channels, frames * sizes.frames, rows * sizes.rows, columns * sizes.columns)

    def denoise(self, model: Any, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Call the model once, on videos; returns its prediction, (B, C, T, H, W) to (B, C, T, H, W)."""
        x = demo.with_positions(x_BCHW) if is_pixel_space(model) else x_BCHW
        return super().denoise(model, x, timesteps_B, conditions)[:, : x_BCHW.shape[1]]

    def latents(self, inputs: Mapping[str, Any], grid: Extent) -> Tensor:
        x: Tensor = inputs["hidden_states"]
        return x[:, :RGB] if _has_positions(x.shape[1]) else x

    def given_channels(self, model: Any) -> int:
        return 0 if _has_positions(model.config.in_channels) else super().given_channels(model)

    def pixels_per_token(self, model: Any) -> int:
        return self.latent_patch(model) * (1 if is_pixel_space(model) else VAE_SCALE)

    def latent_patch(self, model: Any) -> int:
        return int(model.config.patch_size[1])

    def default_frames(self, model: Any) -> int:
        return motion.FRAMES if is_pixel_space(model) else _FRAMES

    def token_frames(self, model: Any, frames: int) -> int | None:
        return frames_in_tokens(frames, int(model.config.patch_size[0]), 1 if is_pixel_space(model) else VAE_FRAMES)

    def default_sizes(self, model: Any) -> tuple[Extent, ...]:
        """Return the sizes of the released checkpoints; of the demo model its own, twice and four times it."""
        sizes = [(motion.SIDE * n, motion.SIDE * n) for n in (1, 2, 4)] if is_pixel_space(model) else _SIZES
        return tuple((self.default_frames(model), *size) for size in sizes)

    def example_grid(self, model: Any) -> Extent:
        return 5, 6, 9

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        tokens, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return {"encoder_hidden_states": tokens}


def _has_positions(channels: int) -> bool:
    """Tell the demo model's input, pixels with their positions."""
    return channels == RGB + demo.POSITION_CHANNELS


FAMILY = Wan()
