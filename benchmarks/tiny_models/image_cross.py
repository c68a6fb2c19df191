"""Image transformers whose image tokens see the text by cross-attention, if at all."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tiny_models.base import (
    ATTENTION,
    CHANNELS,
    CROSS,
    HEAD_DIM,
    HEADS,
    KEEP,
    LINEAR,
    REWRITE,
    SIZES,
    TEXT_DIM,
    WIDTH,
    Size,
    configuration,
    latents,
    make,
    steps,
    text,
    text_mask,
    tuples,
)

GROUP = "Image: cross-attention to text, or no text"
LATENTS: dict[str, Any] = {"sample_size": 16, "patch_size": 2, "in_channels": CHANNELS}
CROSSED = {"*.attn1": REWRITE, "*.attn2": KEEP}


def pixart_inputs(size: Size) -> dict[str, Any]:
    return tuples(
        hidden_states=latents(size),
        encoder_hidden_states=text(size),
        encoder_attention_mask=text_mask(size),
        timestep=steps(size),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


@configuration(GROUP, pixart_inputs, CROSSED)
def PixArtTransformer2DModel() -> nn.Module:
    options = {"num_layers": 2, "out_channels": 2 * CHANNELS, "cross_attention_dim": WIDTH, "caption_channels": TEXT_DIM}
    return make(diffusers.PixArtTransformer2DModel, **ATTENTION, **LATENTS, **options, use_additional_conditions=False, norm_num_groups=4)


def dit_inputs(size: Size) -> dict[str, Any]:
    return tuples(hidden_states=latents(size), timestep=steps(size), class_labels=torch.arange(size.batch))


SQUARE = (SIZES[0]._replace(height=6, width=6), SIZES[1]._replace(height=8, width=8))


@configuration(GROUP, dit_inputs, sizes=SQUARE, note="square images only")
def DiTTransformer2DModel() -> nn.Module:
    options = {**ATTENTION, **LATENTS, "sample_size": 12, "num_layers": 2, "out_channels": 2 * CHANNELS}
    return make(diffusers.DiTTransformer2DModel, **options, num_embeds_ada_norm=10, norm_num_groups=4)


def sana_inputs(size: Size) -> dict[str, Any]:
    given = {"encoder_hidden_states": text(size), "encoder_attention_mask": text_mask(size), "timestep": steps(size)}
    return tuples(hidden_states=latents(size, patch=1), **given)


@configuration(GROUP, sana_inputs, {"*.attn1": LINEAR, "*.attn2": CROSS}, note="its self-attention is linear already")
def SanaTransformer2DModel() -> nn.Module:
    cross = {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH}
    options = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "sample_size": 16, "patch_size": 1}
    return make(diffusers.SanaTransformer2DModel, **ATTENTION, **options, **cross, caption_channels=TEXT_DIM)
