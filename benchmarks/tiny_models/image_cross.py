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
    TEXT,
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
    options = {"num_layers": 1, "out_channels": 2 * CHANNELS, "cross_attention_dim": WIDTH, "caption_channels": TEXT_DIM}
    return make(diffusers.PixArtTransformer2DModel, **ATTENTION, **LATENTS, **options, use_additional_conditions=False, norm_num_groups=4)


def dit_inputs(size: Size) -> dict[str, Any]:
    return tuples(hidden_states=latents(size), timestep=steps(size), class_labels=torch.arange(size.batch))


SQUARE = (SIZES[0]._replace(height=6, width=6), SIZES[1]._replace(height=8, width=8))


@configuration(GROUP, dit_inputs, sizes=SQUARE, note="square images only")
def DiTTransformer2DModel() -> nn.Module:
    options = {**ATTENTION, **LATENTS, "sample_size": 12, "num_layers": 1, "out_channels": 2 * CHANNELS}
    return make(diffusers.DiTTransformer2DModel, **options, num_embeds_ada_norm=10, norm_num_groups=4)


def sana_inputs(size: Size) -> dict[str, Any]:
    given = {"encoder_hidden_states": text(size), "encoder_attention_mask": text_mask(size), "timestep": steps(size)}
    return tuples(hidden_states=latents(size, patch=1), **given)


@configuration(GROUP, sana_inputs, {"*.attn1": LINEAR, "*.attn2": CROSS}, note="its self-attention is linear already")
def SanaTransformer2DModel() -> nn.Module:
    cross = {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH}
    options = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1, "sample_size": 16, "patch_size": 1}
    return make(diffusers.SanaTransformer2DModel, **ATTENTION, **options, **cross, caption_channels=TEXT_DIM)


def hunyuan_dit_inputs(size: Size) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    grid, t5_length = (size.height, size.width), 9
    fixed = size._replace(text=7)  # the class has a table of padding for one length of text
    return tuples(
        hidden_states=latents(size),
        timestep=steps(size),
        encoder_hidden_states=text(fixed),
        text_embedding_mask=text_mask(fixed),
        encoder_hidden_states_t5=text(size, 40, length=t5_length),
        text_embedding_mask_t5=text_mask(size, length=t5_length),
        image_meta_size=torch.tensor([[80.0, 112.0, 80.0, 112.0, 0.0, 0.0]]).repeat(size.batch, 1),
        style=torch.zeros(size.batch, dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(HEAD_DIM, ((0, 0), grid), grid),
    )


@configuration(GROUP, hunyuan_dit_inputs, {**CROSSED, "*pooler": TEXT})
def HunyuanDiT2DModel() -> nn.Module:
    """Four layers, so that there is one long skip connection."""
    words = {"text_len": 7, "cross_attention_dim": TEXT_DIM, "text_len_t5": 9, "cross_attention_dim_t5": 40, "pooled_projection_dim": 28}
    return make(diffusers.HunyuanDiT2DModel, **ATTENTION, **LATENTS, **words, hidden_size=WIDTH, num_layers=4)


def lumina_next_inputs(size: Size) -> dict[str, Any]:
    """A complex table of rotations larger than the grid, which the model slices, as its pipeline makes it."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    given = {"timestep": steps(size, 1.0), "encoder_hidden_states": text(size), "encoder_mask": text_mask(size)}
    table = get_2d_rotary_pos_embed_lumina(HEAD_DIM, 20, 22)
    return tuples(hidden_states=latents(size), **given, image_rotary_emb=table, cross_attention_kwargs={})


@configuration(GROUP, lumina_next_inputs, CROSSED)
def LuminaNextDiT2DModel() -> nn.Module:
    heads = {"hidden_size": 6 * HEAD_DIM, "num_attention_heads": 6, "num_kv_heads": 3, "multiple_of": 32, "num_layers": 1}
    return make(diffusers.LuminaNextDiT2DModel, **LATENTS, **heads, cross_attention_dim=TEXT_DIM)


def of_unet(size: Size) -> dict[str, Any]:
    """One level of a UNet: features of a picture, a text."""
    return tuples(hidden_states=latents(size, WIDTH, patch=1), encoder_hidden_states=text(size))


@configuration(GROUP, of_unet, CROSSED, note="the block of a UNet")
def Transformer2DModel() -> nn.Module:
    options = {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": TEXT_DIM, "num_layers": 1}
    return make(diffusers.Transformer2DModel, **ATTENTION, **options)


@configuration(GROUP, of_unet, CROSSED, note="the block of a UNet")
def Transformer2DModel__linear_projection() -> nn.Module:
    options = {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": TEXT_DIM, "num_layers": 1, "use_linear_projection": True}
    return make(diffusers.Transformer2DModel, **ATTENTION, **options)


@configuration(GROUP, of_unet, CROSSED, note="the block of a UNet")
def DreamLiteTransformer2DModel() -> nn.Module:
    options = {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": TEXT_DIM, "num_layers": 1}
    return make(diffusers.DreamLiteTransformer2DModel, **ATTENTION, **options)
