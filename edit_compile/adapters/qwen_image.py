"""Qwen-Image: 2 x 2 latents are packed into one token, the grid is passed as numbers, and timesteps lie in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edit_compile.adapters.family import InputSizes
from edit_compile.adapters.packing import PackedFamily, pack, unpack


class QwenImage(PackedFamily):
    """The transformer of diffusers' QwenImagePipeline."""

    max_text_tokens = 1024
    denoise_arguments = ("hidden_states", "timestep", "img_shapes", "encoder_hidden_states_mask", "return_dict")

    def given_channels(self, model: Any) -> int:
        return int(model.config.in_channels) - int(model.config.out_channels) * self.packed**2

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        return {
            "hidden_states": sizes.floats(sizes.rows * sizes.columns, model.config.in_channels),
            "encoder_hidden_states": sizes.floats(sizes.text, model.config.joint_attention_dim),
            "timestep": sizes.floats(),
            "img_shapes": [[(1, sizes.rows, sizes.columns)]] * sizes.batch,
            "return_dict": False,
        }

    def denoise(self, model: Any, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        rows, columns = (side // self.packed for side in x_BCHW.shape[2:])
        mask = conditions.get("encoder_attention_mask")
        (tokens_BNC,) = model(
            hidden_states=pack(x_BCHW, self.packed),
            timestep=timesteps_B / 1000,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_hidden_states_mask=None if mask is None else mask.bool(),
            img_shapes=[[(1, rows, columns)]] * len(x_BCHW),
            return_dict=False,
        )
        return unpack(tokens_BNC, (rows, columns), self.packed)

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        tokens, mask = pipe.encode_prompt(captions, **options)
        if mask is None:  # no caption was padded
            mask = torch.ones(tokens.shape[:2], device=tokens.device)
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask.float()}


FAMILY = QwenImage()
