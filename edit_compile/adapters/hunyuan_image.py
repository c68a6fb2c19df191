"""HunyuanImage 2.1: a latent is a token of 32 x 32 pixels; a second text encoder reads what is quoted in the caption, letter by letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edit_compile.adapters.family import InputSizes, Size, TextToImageFamily

VAE_SCALE = 32
GUIDANCE = 3.25  # what models with distilled guidance are told; the default of the pipeline, times 1000


class HunyuanImage(TextToImageFamily):
    """The transformer of diffusers' HunyuanImagePipeline."""

    max_text_tokens = 1000

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        down, right = model.config.patch_size
        config = model.config
        inputs = {
            "hidden_states": sizes.floats(config.in_channels, down * sizes.rows, right * sizes.columns),
            "encoder_hidden_states": sizes.floats(sizes.text, config.text_embed_dim),
            "encoder_attention_mask": torch.ones_like(sizes.floats(sizes.text)),
            "timestep": sizes.floats(),
            "return_dict": False,
        }
        return inputs | ({"guidance": sizes.floats()} if config.guidance_embeds else {})

    def pixels_per_token(self, model: Any) -> int:
        return VAE_SCALE * int(model.config.patch_size[0])

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        device = {"device": options["device"]}  # the pipeline's token counts are fixed
        tokens, mask, glyphs, glyph_mask = pipe.encode_prompt(captions, batch_size=len(captions), **device)
        return {
            "encoder_hidden_states": tokens,
            "encoder_attention_mask": mask.float(),
            "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": glyph_mask.float(),
        }

    def other_conditions(self, model: Any, size: Size, batch: int) -> dict[str, Any]:
        return {"guidance": torch.full((batch,), 1000 * GUIDANCE)} if model.config.guidance_embeds else {}

    def latent_patch(self, model: Any) -> int:
        return int(model.config.patch_size[0])

    def denoise(self, model: Any, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        prediction: Tensor = model(hidden_states=x_BCHW, timestep=timesteps_B, return_dict=False, **self._known(model, conditions))[0]
        return prediction

    def _known(self, model: Any, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the second text encoder's conditions where the model does not read them."""
        return {name: x for name, x in conditions.items() if model.config.text_embed_2_dim is not None or not name.endswith("_2")}


FAMILY = HunyuanImage()
