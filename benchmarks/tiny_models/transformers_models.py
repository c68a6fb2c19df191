"""The vision transformers of transformers, shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tiny_models.base import KEEP, POOLING, REWRITE, SIZES, Size, configuration, lively, normal

GROUP = "Vision transformers of transformers"
FIXED = (SIZES[0], SIZES[0]._replace(batch=3))
PATCH = 8
SHAPE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
IMAGE: dict[str, Any] = {"image_size": (PATCH * SIZES[0].height, PATCH * SIZES[0].width), "patch_size": PATCH}

SQUARE = {"image_size": 48}  # tables of positions are stretched from a square


def pixels(size: Size) -> dict[str, Any]:
    return {"pixel_values": normal(size.batch, 3, PATCH * size.height, PATCH * size.width), "return_dict": False}


def free(size: Size) -> dict[str, Any]:
    return {**pixels(size), "interpolate_pos_encoding": True}


def tiny(
    name: str, config: str, sites: dict[str, str] | None = None, inputs: Callable[[Size], dict[str, Any]] = pixels, **more: Any
) -> None:
    """Enter a model by its class and its configuration's class; `options` among `more` go to the configuration."""
    options = {**SHAPE, **IMAGE, **more.pop("options", {})}

    def make() -> nn.Module:
        torch.manual_seed(0)
        return lively(getattr(transformers, name)(getattr(transformers, config)(**options)).eval())

    configuration(GROUP, inputs, sites, name=f"transformers {name}", **{"sizes": FIXED, **more})(make)


tiny("ViTModel", "ViTConfig", options=SQUARE, inputs=free, sizes=SIZES)
tiny("DeiTModel", "DeiTConfig")
tiny("Dinov2Model", "Dinov2Config", options=SQUARE, sizes=SIZES)
tiny("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", options=SQUARE, sizes=SIZES)
tiny("DINOv3ViTModel", "DINOv3ViTConfig", sizes=SIZES)
tiny("IJepaModel", "IJepaConfig")
tiny("ViTMSNModel", "ViTMSNConfig")
tiny(
    "CLIPVisionModel",
    "CLIPVisionConfig",
    options={"image_size": 48},
    sizes=(SIZES[0]._replace(width=6), SIZES[0]._replace(width=6, batch=3)),
)
tiny(
    "SiglipVisionModel",
    "SiglipVisionConfig",
    {"*self_attn*": REWRITE, "*head*": POOLING},
    options={"image_size": 48},
    sizes=(SIZES[0]._replace(width=6), SIZES[0]._replace(width=6, batch=3)),
)
tiny("YolosModel", "YolosConfig", options={"num_detection_tokens": 5})
tiny("BeitModel", "BeitConfig", {"*": "keep: .*differs from query to query"}, options={"use_relative_position_bias": True})
tiny(
    "SegformerModel",
    "SegformerConfig",
    {"stages.3.*": REWRITE, "*": KEEP},
    inputs=lambda s: {"pixel_values": normal(s.batch, 3, 32 * s.height, 32 * s.width), "return_dict": False},
    options={"num_hidden_layers": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2]},
    sizes=SIZES,
    note="keys on a coarser grid but for the last stage",
)
