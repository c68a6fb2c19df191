"""Image transformers whose text and image tokens are in one attention."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tiny_models.base import (
    ATTENTION,
    CHANNELS,
    PACKED,
    POOLED_DIM,
    TEXT_DIM,
    WIDTH,
    Size,
    configuration,
    latents,
    make,
    normal,
    positions,
    steps,
    text,
    text_mask,
    tuples,
)

GROUP = "Image: text and image in one attention"
LATENTS: dict[str, Any] = {"sample_size": 16, "patch_size": 2, "in_channels": CHANNELS}


def packed(size: Size, columns: str = "thw") -> dict[str, Any]:
    return tuples(
        hidden_states=normal(size.batch, size.tokens, PACKED),
        encoder_hidden_states=text(size),
        timestep=steps(size, 1.0),
        img_ids=positions(size, columns),
        txt_ids=torch.zeros(size.text, len(columns)),
    )


def pooled(size: Size) -> torch.Tensor:
    return normal(size.batch, POOLED_DIM, seed=4)


def sd3_inputs(size: Size) -> dict[str, Any]:
    return tuples(hidden_states=latents(size), encoder_hidden_states=text(size), pooled_projections=pooled(size), timestep=steps(size))


@configuration(GROUP, sd3_inputs)
def SD3Transformer2DModel() -> nn.Module:
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED_DIM}
    return make(
        diffusers.SD3Transformer2DModel, **ATTENTION, **LATENTS, **text_options, num_layers=3, out_channels=4, pos_embed_max_size=20
    )


@configuration(GROUP, sd3_inputs)
def SD3Transformer2DModel__dual() -> nn.Module:
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED_DIM}
    more = {"num_layers": 3, "out_channels": 4, "pos_embed_max_size": 20, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    return make(diffusers.SD3Transformer2DModel, **ATTENTION, **LATENTS, **text_options, **more)


@configuration(GROUP, lambda s: {**packed(s), "pooled_projections": pooled(s), "guidance": torch.full((s.batch,), 3.5)})
def FluxTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
    return make(diffusers.FluxTransformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM, pooled_projection_dim=POOLED_DIM)


@configuration(GROUP, lambda s: {**packed(s, "thwl"), "guidance": torch.full((s.batch,), 3.5)})
def Flux2Transformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)}
    return make(diffusers.Flux2Transformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM, timestep_guidance_channels=32)


@configuration(GROUP, packed)
def BriaTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": [4, 6, 6]}
    return make(diffusers.BriaTransformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM)


def chroma_inputs(size: Size) -> dict[str, Any]:
    """The mask covers text and image and is 0 or 1 in the dtype of the model, as its pipeline makes it: diffusers adds it to the scores."""
    mask = torch.cat([text_mask(size).float(), torch.ones(size.batch, size.tokens)], dim=1)
    return {**packed(size), "attention_mask": mask}


@configuration(GROUP, chroma_inputs)
def ChromaTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)}
    approximator = {"approximator_num_channels": 32, "approximator_hidden_dim": 40, "approximator_layers": 2}
    return make(diffusers.ChromaTransformer2DModel, **ATTENTION, **options, **approximator, joint_attention_dim=TEXT_DIM)


def cogview_inputs(size: Size) -> dict[str, Any]:
    """No mask, as in its pipeline."""
    pixels = torch.tensor([[16.0 * size.height, 16.0 * size.width]]).repeat(size.batch, 1)
    sizes = {"original_size": pixels, "target_size": pixels.clone(), "crop_coords": torch.zeros(size.batch, 2)}
    return tuples(hidden_states=latents(size), encoder_hidden_states=text(size), timestep=steps(size), **sizes)


@configuration(GROUP, cogview_inputs)
def CogView4Transformer2DModel() -> nn.Module:
    options = {"patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2}
    return make(diffusers.CogView4Transformer2DModel, **ATTENTION, **options, text_embed_dim=TEXT_DIM, time_embed_dim=40, condition_dim=6)


@configuration(GROUP, cogview_inputs)
def CogView3PlusTransformer2DModel() -> nn.Module:
    options = {"patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "pos_embed_max_size": 20}
    options |= {"text_embed_dim": TEXT_DIM, "time_embed_dim": 40, "condition_dim": 6, "sample_size": 16}
    return make(diffusers.CogView3PlusTransformer2DModel, **ATTENTION, **options)


@configuration(GROUP, lambda s: tuples(hidden_states=latents(s), encoder_hidden_states=text(s), timestep=steps(s, 1.0)))
def AuraFlowTransformer2DModel() -> nn.Module:
    options = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "out_channels": CHANNELS, "pos_embed_max_size": 256}
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH}
    return make(diffusers.AuraFlowTransformer2DModel, **ATTENTION, **LATENTS, **options, **text_options)
