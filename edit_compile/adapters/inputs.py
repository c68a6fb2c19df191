"""Example inputs for the model families users ask for first. Everything else brings its own, or records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.errors import NoExampleInputsError

BATCH, TEXT, HEIGHT, WIDTH = 2, 13, 20, 28  # all different, none 1: equal sizes would merge in the graph


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _pixart(model: Any) -> dict[str, Any]:
    added = {"resolution": _floats(BATCH, 2), "aspect_ratio": _floats(BATCH, 1)}
    use_added = getattr(model, "use_additional_conditions", False)
    return {
        "hidden_states": _floats(BATCH, model.config.in_channels, HEIGHT, WIDTH),
        "encoder_hidden_states": _floats(BATCH, TEXT, model.config.caption_channels),
        "timestep": torch.empty(BATCH, dtype=torch.int64, device="meta"),
        "added_cond_kwargs": added if use_added else {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": _floats(BATCH, TEXT),
        "return_dict": False,
    }


def _sd3(model: Any) -> dict[str, Any]:
    return {
        "hidden_states": _floats(BATCH, model.config.in_channels, HEIGHT, WIDTH),
        "encoder_hidden_states": _floats(BATCH, TEXT, model.config.joint_attention_dim),
        "pooled_projections": _floats(BATCH, model.config.pooled_projection_dim),
        "timestep": _floats(BATCH),
        "return_dict": False,
    }


def _flux(model: Any) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    inputs = {
        "hidden_states": _floats(BATCH, rows.numel(), model.config.in_channels),
        "encoder_hidden_states": _floats(BATCH, TEXT, model.config.joint_attention_dim),
        "pooled_projections": _floats(BATCH, model.config.pooled_projection_dim),
        "timestep": _floats(BATCH),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return inputs | ({"guidance": _floats(BATCH)} if model.config.guidance_embeds else {})


def _dit(model: Any) -> dict[str, Any]:
    side = model.config.sample_size
    return {
        "hidden_states": _floats(BATCH, model.config.in_channels, side, side),
        "timestep": torch.empty(BATCH, dtype=torch.int64, device="meta"),
        "class_labels": torch.empty(BATCH, dtype=torch.int64, device="meta"),
        "return_dict": False,
    }


def _vit(model: Any) -> dict[str, Any]:
    embed = model.patch_embed
    return {"x": _floats(BATCH, embed.proj.in_channels, *embed.img_size)}


_FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "DiTTransformer2DModel": _dit,
    "VisionTransformer": _vit,
}


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one forward, small, on the meta device in bfloat16 (position ids are real).

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    for base in type(model).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__](model)
    raise NoExampleInputsError(
        f"no example inputs are known for {type(model).__name__} (known: {', '.join(_FAMILIES)}); pass "
        "example_inputs=dict(...), keyword arguments of one forward, or record them: edit_compile.record(pipe, prompt=...)"
    )
