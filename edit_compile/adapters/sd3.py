"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edit_compile.adapters.family import InputSizes, TextToImageFamily


class SD3(TextToImageFamily):
    """The MM-DiT of diffusers' StableDiffusion3Pipeline."""

    max_text_tokens = 77 + 256  # of CLIP and of T5

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        return {
            "hidden_states": self.random_latents(model, sizes),
            "encoder_hidden_states": sizes.floats(sizes.text, model.config.joint_attention_dim),
            "pooled_projections": sizes.floats(model.config.pooled_projection_dim),
            "timestep": sizes.floats(),
            "return_dict": False,
        }

    def size_limit(self, model: Any, rows: int, columns: int) -> str | None:
        limit = model.config.pos_embed_max_size
        if limit is None or max(rows, columns) <= limit:  # without a table they are computed
            return None
        return f"its positions (pos_embed_max_size={limit}) end at {limit * self.pixels_per_token(model)} px"

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        tokens, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False, **options)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


FAMILY = SD3()
