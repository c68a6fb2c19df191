"""FLUX.2: 2 x 2 latents are one token, positions are ids (time, row, column, place in the text), and timesteps lie in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edit_compile.adapters.family import VAE_SCALE, Extent, InputSizes, Size, TextToImageFamily
from edit_compile.adapters.packing import pack, position_ids, unpack

PATCH = 2
GUIDANCE = 4.0  # what models with distilled guidance are told; the default of FLUX.2's pipeline


class Flux2(TextToImageFamily):
    """The transformer of diffusers' Flux2Pipeline. Its latents are patches already: (B, 128, rows, columns)."""

    max_text_tokens = 512
    denoise_arguments = ("hidden_states", "timestep", "img_ids", "txt_ids", "return_dict")

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        inputs = {
            "hidden_states": sizes.floats(sizes.rows * sizes.columns, model.config.in_channels),
            "encoder_hidden_states": sizes.floats(sizes.text, model.config.joint_attention_dim),
            "timestep": sizes.floats(),
            "img_ids": position_ids(sizes.rows, sizes.columns, 1, 1),
            "txt_ids": text_ids(sizes.text),
            "return_dict": False,
        }
        return inputs | ({"guidance": sizes.floats()} if model.config.guidance_embeds else {})

    def pixels_per_token(self, model: Any) -> int:
        return PATCH * VAE_SCALE

    def denoise(self, model: Any, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        rows, columns = x_BCHW.shape[2:]
        (tokens_BNC,) = model(
            hidden_states=pack(x_BCHW, 1),
            timestep=timesteps_B / 1000,
            img_ids=position_ids(rows, columns, 1, 1).to(x_BCHW),
            txt_ids=text_ids(conditions["encoder_hidden_states"].shape[1]).to(x_BCHW),
            return_dict=False,
            **conditions,
        )
        return unpack(tokens_BNC, (rows, columns), 1)

    def latents(self, inputs: Mapping[str, Any], grid: Extent) -> Tensor:
        return unpack(inputs["hidden_states"], grid, 1)

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        tokens, _ = pipe.encode_prompt(captions, **options)
        return {"encoder_hidden_states": tokens}

    def other_conditions(self, model: Any, size: Size, batch: int) -> dict[str, Any]:
        return {"guidance": torch.full((batch,), GUIDANCE)} if model.config.guidance_embeds else {}

    def latent_patch(self, model: Any) -> int:
        return PATCH

    def unpack_samples(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        height, width = size
        step = PATCH * pipe.vae_scale_factor
        return unpack(latents, (height // step, width // step), 1)


def text_ids(count: int) -> Tensor:
    """Number the text tokens in the last of four columns, (count, 4) float32."""
    places = torch.arange(float(count))
    return torch.stack([*[torch.zeros_like(places)] * 3, places], -1)


FAMILY = Flux2()
