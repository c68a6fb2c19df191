"""UNets and ControlNets of diffusers: attention at several resolutions, and copies of a transformer's first blocks."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tiny_models.base import (
    ATTENTION,
    CHANNELS,
    CROSS,
    PACKED,
    POOLED_DIM,
    REWRITE,
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
    tuples,
)

GROUP = "UNets and ControlNets"
CROSSED = {"*.attn1": REWRITE, "*.attn2": CROSS}
LEVELS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": TEXT_DIM}
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def unet_inputs(size: Size) -> dict[str, Any]:
    return tuples(sample=latents(size), timestep=steps(size), encoder_hidden_states=text(size))


@configuration(GROUP, unet_inputs, CROSSED, note="two resolutions")
def UNet2DConditionModel() -> nn.Module:
    return make(diffusers.UNet2DConditionModel, **LEVELS, attention_head_dim=4, down_block_types=DOWN, up_block_types=UP)


def sdxl_inputs(size: Size) -> dict[str, Any]:
    added = {
        "text_embeds": normal(size.batch, 20, seed=5),
        "time_ids": torch.tensor([[96.0, 160.0, 0.0, 0.0, 96.0, 160.0]]).repeat(size.batch, 1),
    }
    return {**unet_inputs(size), "added_cond_kwargs": added}


@configuration(GROUP, sdxl_inputs, CROSSED, note="the coarser resolution alone")
def UNet2DConditionModel__text_time() -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", DOWN[0]), "up_block_types": (UP[0], "UpBlock2D"), "use_linear_projection": True}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20}
    return make(diffusers.UNet2DConditionModel, **LEVELS, **blocks, **added, attention_head_dim=(2, 4), transformer_layers_per_block=1)


@configuration(GROUP, lambda s: tuples(sample=latents(s), timestep=steps(s)), note="attention without text, 1-D norms before it")
def UNet2DModel() -> nn.Module:
    options = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return make(diffusers.UNet2DModel, **options, **blocks, in_channels=CHANNELS, out_channels=CHANNELS)


def control_inputs(size: Size) -> dict[str, Any]:
    picture = normal(size.batch, 3, 16 * size.height, 16 * size.width, seed=5)
    return {**unet_inputs(size), "controlnet_cond": picture}


@configuration(GROUP, control_inputs, CROSSED, note="two resolutions")
def ControlNetModel() -> nn.Module:
    return make(diffusers.ControlNetModel, **LEVELS, attention_head_dim=4, down_block_types=DOWN)


def flux_inputs(size: Size) -> dict[str, Any]:
    return tuples(
        hidden_states=normal(size.batch, size.tokens, PACKED),
        controlnet_cond=normal(size.batch, size.tokens, PACKED, seed=5),
        encoder_hidden_states=text(size),
        pooled_projections=normal(size.batch, POOLED_DIM, seed=4),
        timestep=steps(size, 1.0),
        img_ids=positions(size),
        txt_ids=torch.zeros(size.text, 3),
    )


@configuration(GROUP, flux_inputs)
def FluxControlNetModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 6, 6)}
    return make(diffusers.FluxControlNetModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM, pooled_projection_dim=POOLED_DIM)


def sd3_inputs(size: Size) -> dict[str, Any]:
    given = {"encoder_hidden_states": text(size), "pooled_projections": normal(size.batch, POOLED_DIM, seed=4), "timestep": steps(size)}
    return tuples(hidden_states=latents(size), controlnet_cond=latents(size), **given)


@configuration(GROUP, sd3_inputs)
def SD3ControlNetModel() -> nn.Module:
    options = {"sample_size": 16, "in_channels": CHANNELS, "num_layers": 1, "out_channels": CHANNELS, "pos_embed_max_size": 20}
    dims = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED_DIM}
    return make(diffusers.SD3ControlNetModel, **ATTENTION, **options, **dims)
