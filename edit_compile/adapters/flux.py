"""FLUX.1: 2 x 2 latents are packed into one token, positions are passed as ids, and timesteps lie in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from edit_compile.adapters.family import InputSizes, Size
from edit_compile.adapters.packing import PackedFamily, pack, position_ids, unpack


class Flux(PackedFamily):
    """The transformer of diffusers' FluxPipeline.

    Attributes:
        guidance: what models with distilled guidance are told; the default of the pipeline.
    """

    guidance: ClassVar[float] = 3.5
    max_text_tokens = 512
    denoise_arguments = ("hidden_states", "timestep", "img_ids", "txt_ids", "return_dict")

    def image_ids(self, rows: int, columns: int) -> Tensor:
        """Number the image tokens, (rows * columns, 3) float32: 0, row, column."""
        return position_ids(rows, columns, 1, 0)

    def text_ids(self, count: int) -> Tensor:
        """Return the ids of text tokens, (count, 3) float32 zeros: they have no positions."""
        return torch.zeros(count, 3)

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        return self.inputs_with_ids(model, sizes) | {"pooled_projections": sizes.floats(model.config.pooled_projection_dim)}

    def inputs_with_ids(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        """Make the keyword arguments of one forward that FLUX.1 and FLUX.2 share."""
        inputs = {
            "hidden_states": sizes.floats(sizes.rows * sizes.columns, model.config.in_channels),
            "encoder_hidden_states": sizes.floats(sizes.text, model.config.joint_attention_dim),
            "timestep": sizes.floats(),
            "img_ids": self.image_ids(sizes.rows, sizes.columns),
            "txt_ids": self.text_ids(sizes.text),
            "return_dict": False,
        }
        return inputs | ({"guidance": sizes.floats()} if model.config.guidance_embeds else {})

    def denoise(self, model: Any, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        rows, columns = (side // self.packed for side in x_BCHW.shape[2:])
        (tokens_BNC,) = model(
            hidden_states=pack(x_BCHW, self.packed),
            timestep=timesteps_B / 1000,
            img_ids=self.image_ids(rows, columns).to(x_BCHW),
            txt_ids=self.text_ids(conditions["encoder_hidden_states"].shape[1]).to(x_BCHW),
            return_dict=False,
            **conditions,
        )
        return unpack(tokens_BNC, (rows, columns), self.packed)

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        tokens, pooled, _ = pipe.encode_prompt(captions, **options)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def other_conditions(self, model: Any, size: Size, batch: int) -> dict[str, Any]:
        return {"guidance": torch.full((batch,), self.guidance)} if model.config.guidance_embeds else {}


FAMILY = Flux()
