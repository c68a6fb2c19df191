"""timm's vision transformers, shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from tiny_models.base import CHANNEL_ATTENTION as CHANNELS
from tiny_models.base import KEEP, LINEAR, POOLING, REWRITE, SIZES, Size, configuration, lively, normal

GROUP = "Vision transformers of timm"
WINDOWS, BIAS = "keep: .*(windows|blocks|part of the image)", "keep: .*differs from query to query"
FIXED = (SIZES[0], SIZES[0]._replace(batch=3))  # tables of positions for one resolution
VIT: dict[str, Any] = {"embed_dim": 96, "depth": 2, "num_heads": 6}  # what a class token reads changes in the second block only


def picture(patch: int) -> Callable[[Size], dict[str, Any]]:
    return lambda size: {"x": normal(size.batch, 3, patch * size.height, patch * size.width)}


def pixels(patch: int, size: Size = SIZES[0]) -> tuple[int, int]:
    return patch * size.height, patch * size.width


def model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return lively(timm.create_model(name, pretrained=False, num_classes=10, **options).eval())


def tiny(name: str, sites: dict[str, str] | None = None, patch: int = 16, *, variant: str = "", **more: Any) -> None:
    """Enter a model under the name that timm has for it; `options` among `more` go to its constructor."""
    options = more.pop("options", {})
    called = f"timm {name}{variant}"
    configuration(GROUP, picture(patch), sites, name=called, **more)(lambda: model(name, **options))


tiny("vit_tiny_patch16_224", options={**VIT, "img_size": pixels(16), "dynamic_img_size": True})
tiny(
    "vit_tiny_patch16_224",
    variant="/registers",
    sizes=FIXED,
    options={**VIT, "img_size": pixels(16), "reg_tokens": 4, "no_embed_class": True},
)
tiny(
    "vit_tiny_patch16_224",
    variant="/average",
    sizes=FIXED,
    options={**VIT, "img_size": pixels(16), "class_token": False, "global_pool": "avg"},
)
tiny("deit_tiny_distilled_patch16_224", sizes=FIXED, options={**VIT, "img_size": pixels(16)})
tiny("deit3_small_patch16_224", sizes=FIXED, options={**VIT, "img_size": pixels(16)})
tiny("vit_base_patch16_siglip_224", {"blocks.*": REWRITE, "attn_pool": POOLING}, sizes=FIXED, options={**VIT, "img_size": pixels(16)})
tiny("vit_small_patch14_dinov2", patch=14, sizes=FIXED, options={**VIT, "img_size": pixels(14)})
tiny("vit_small_patch16_dinov3", options={**VIT, "img_size": pixels(16), "dynamic_img_size": True})
tiny("eva02_tiny_patch14_224", patch=14, sizes=FIXED, options={**VIT, "img_size": pixels(14)})
tiny("naflexvit_base_patch16_gap", options={**VIT, "img_size": pixels(16)})
tiny("pit_ti_224", patch=8, sizes=FIXED, options={"img_size": pixels(8), "patch_size": 8, "depth": [1, 1, 1]}, note="three resolutions")
tiny(
    "tnt_s_legacy_patch16_224",
    {"*attn_out": REWRITE, "*attn_in": WINDOWS},
    sizes=FIXED,
    stated=True,
    options={"img_size": pixels(16), "depth": 1},
)
tiny(
    "visformer_tiny",
    {"*": REWRITE},
    patch=32,
    sizes=FIXED,
    options={"img_size": pixels(32), "depth": (1, 1, 1)},
    note="1 x 1 convolutions project",
)
tiny("vitamin_small_224", patch=16, sizes=FIXED, options={"img_size": pixels(16), "depth": 1})
tiny(
    "crossvit_tiny_240",
    {"blocks.*.blocks.*": REWRITE, "blocks.*.fusion.*": KEEP},
    patch=48,
    sizes=FIXED,
    options={"img_size": pixels(48), "depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))},
    note="two grids of patches",
)
tiny(
    "hiera_tiny_224",
    {"blocks.0*": WINDOWS, "*": "keep: .*not self-attention"},
    patch=32,
    sizes=FIXED,
    options={"img_size": pixels(32), "stages": (1, 1, 1, 1)},
)
tiny(
    "pvt_v2_b0",
    {"stages.3*": REWRITE, "*": KEEP},
    patch=32,
    options={"depths": (1, 1, 1, 1)},
    note="keys on a coarser grid but for the last stage",
)
tiny("beit_base_patch16_224", {"*": BIAS}, sizes=FIXED, options={**VIT, "img_size": pixels(16)}, note="a bias for every pair of places")
tiny(
    "vit_relpos_small_patch16_224",
    {"*": BIAS},
    sizes=FIXED,
    options={**VIT, "img_size": pixels(16)},
    note="a bias for every pair of places",
)
tiny(
    "levit_128s",
    {"*downsample*": "keep: .*not self-attention", "*": BIAS},
    patch=16,
    sizes=FIXED,
    options={"img_size": pixels(16), "depth": (1, 1, 1)},
    note="a bias for every pair of places",
)
tiny(
    "cait_xxs24_224", {"*": KEEP}, sizes=FIXED, options={**VIT, "img_size": pixels(16)}, note="heads are mixed before and after the softmax"
)
tiny(
    "swin_tiny_patch4_window7_224",
    {"*": WINDOWS},
    patch=32,
    sizes=FIXED,
    options={"img_size": pixels(32), "depths": (2, 1, 1, 1), "window_size": 2},
)
tiny(
    "swinv2_tiny_window8_256",
    {"*": KEEP},
    patch=32,
    sizes=FIXED,
    options={"img_size": pixels(32), "depths": (2, 1, 1, 1), "window_size": 2},
)
tiny(
    "xcit_nano_12_p16_224",
    {"blocks*": CHANNELS, "cls*": POOLING},
    options={"depth": 1, "cls_attn_layers": 1},
    note="attention between channels",
)
tiny("efficientvit_b0", {"*": LINEAR}, patch=32, note="its attention is linear already")
tiny(
    "coat_lite_tiny",
    {"*": LINEAR},
    patch=32,
    sizes=FIXED,
    options={"img_size": pixels(32), "serial_depths": (1, 1, 1, 1)},
    note="its attention is linear already",
)
tiny("twins_pcpvt_small", {"blocks.3*": REWRITE, "*": KEEP}, patch=32, options={"depths": (1, 1, 1, 1)}, note="keys on a coarser grid")
tiny(
    "tiny_vit_5m_224",
    {"*": KEEP},
    patch=32,
    sizes=FIXED,
    options={"depths": (1, 1, 1, 1), "window_sizes": (2, 2, 2, 2)},
)
tiny("davit_tiny", {"*.0.attn": WINDOWS, "*.1.attn": CHANNELS}, patch=32, options={"depths": (1, 1, 1, 1), "window_size": 2})
tiny("mobilevit_xxs", patch=64, note="attention between the same places of all patches, on their grid")
tiny("maxvit_rmlp_pico_rw_256", {"*": KEEP}, patch=64, sizes=FIXED, options={"img_size": pixels(64)}, note="windows and sparse grids")


SQUARE = (SIZES[0]._replace(height=6, width=6), SIZES[0]._replace(batch=3, height=6, width=6))
GATED = {"embed_dim": 24, "depth": 1, "local_up_to_layer": 1, "img_size": 96}
tiny("convit_tiny", {"*": KEEP}, sizes=SQUARE, options=GATED, note="gated places; square images only")


@configuration(
    GROUP,
    picture(32),
    {"*": KEEP},
    name="timm mvitv2",
    sizes=SQUARE,
    note="keys on a coarser grid, and a bias for every pair of places; square images only",
)
def mvitv2() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    torch.manual_seed(0)
    return lively(MultiScaleVit(MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=24), img_size=192, num_classes=10).eval())


@configuration(GROUP, picture(32), name="timm caformer", note="two stages of attention, on two grids")
def caformer() -> nn.Module:
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

    torch.manual_seed(0)
    norms = [LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias]
    mixers = [SepConv, SepConv, Attention, Attention]
    options = {"depths": [1, 1, 1, 1], "dims": [16, 32, 64, 64], "token_mixers": mixers, "norm_layers": norms}
    return lively(MetaFormer(**options, num_classes=10).eval())
