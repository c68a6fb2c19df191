"""FLUX.2: FLUX.1 with other ids (time, row, column, place in the text), without a pooled caption, its latents patches already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edit_compile.adapters.family import InputSizes
from edit_compile.adapters.flux import Flux
from edit_compile.adapters.packing import position_ids


class Flux2(Flux):
    """The transformer of diffusers' Flux2Pipeline. Its latents are (B, 128, rows, columns)."""

    guidance = 4.0
    packed = 1

    def image_ids(self, rows: int, columns: int) -> Tensor:
        """Number the image tokens, (rows * columns, 4) float32: 0, row, column, 0."""
        return position_ids(rows, columns, 1, 1)

    def text_ids(self, count: int) -> Tensor:
        """Number the text tokens in the last of four columns, (count, 4) float32."""
        places = torch.arange(float(count))
        return torch.stack([*[torch.zeros_like(places)] * 3, places], -1)

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        return self.inputs_with_ids(model, sizes)

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        tokens, _ = pipe.encode_prompt(captions, **options)
        return {"encoder_hidden_states": tokens}


FAMILY = Flux2()
