"""Z-Image: images and captions of a batch come in lists, time runs from 0 (noise) to 1, and the velocity has the other sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.family import VAE_SCALE, Extent, InputSizes, TextToImageFamily

PATCH = 2


class ZImage(TextToImageFamily):
    """The transformer of diffusers' ZImagePipeline."""

    max_text_tokens = 512

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        images = sizes.floats(model.config.in_channels, 1, PATCH * sizes.rows, PATCH * sizes.columns)
        captions = sizes.floats(sizes.text, model.config.cap_feat_dim)
        return {"x": list(images.unbind()), "t": sizes.floats(), "cap_feats": list(captions.unbind()), "return_dict": False}

    def conditions(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        captions = torch.stack(inputs["cap_feats"])
        return {"encoder_hidden_states": captions, "encoder_attention_mask": torch.ones_like(captions[:, :, 0])}

    def pixels_per_token(self, model: Any) -> int:
        return PATCH * VAE_SCALE

    def denoise(self, model: Any, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        captions, mask = conditions["encoder_hidden_states"], conditions["encoder_attention_mask"].bool()
        on_meta = captions.is_meta  # where masks have no values
        (velocities,) = model(
            x=list(x_BCHW[:, :, None].unbind()),
            t=1 - timesteps_B / 1000,
            cap_feats=[caption if on_meta else caption[kept] for caption, kept in zip(captions, mask, strict=True)],
            return_dict=False,
        )
        return -torch.stack(list(velocities))[:, :, 0]

    def latents(self, inputs: Mapping[str, Any], grid: Extent) -> Tensor:
        return torch.stack(inputs["x"])[:, :, 0]

    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        embeddings, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        padded = nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(tokens), device=tokens.device) for tokens in embeddings], batch_first=True)
        return {"encoder_hidden_states": padded, "encoder_attention_mask": mask}

    def latent_patch(self, model: Any) -> int:
        return PATCH


FAMILY = ZImage()
