"""The two demo transformers: their configurations, how to call them, and how to sample from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from edit_compile.demo import shapes, text

if TYPE_CHECKING:
    from diffusers import ModelMixin

NAMES = ("mm-dit", "dit")
SOURCES = tuple(f"demo/{name}" for name in NAMES)  # what users call them
GUIDANCE = 2.0


def folder(name: str) -> Path:
    """Return the folder with the trained model's `config.json` and weights."""
    return Path(__file__).parent / name


def untrained(name: str) -> ModelMixin:
    """Make a freshly initialised demo model: `mm-dit` (an SD3 transformer) or `dit` (a PixArt transformer).

    Raises:
        ValueError: there is no model of that name.
    """
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

    if name == "mm-dit":
        return SD3Transformer2DModel(
            sample_size=shapes.IMAGE_SIZE,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=text.TEXT_CHANNELS,
            caption_projection_dim=96,
            pooled_projection_dim=text.TEXT_CHANNELS,
            pos_embed_max_size=64,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    if name == "dit":
        return PixArtTransformer2DModel(
            sample_size=shapes.IMAGE_SIZE,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=3,
            cross_attention_dim=96,
            caption_channels=text.TEXT_CHANNELS,
            norm_num_groups=32,
            use_additional_conditions=False,
            interpolation_scale=1,
        )
    raise ValueError(f"no demo model {name!r}; there are: {', '.join(NAMES)}")


def conditions(model: nn.Module, captions: Sequence[str]) -> dict[str, Any]:
    """Make the keyword arguments of the model's forward that carry B captions, tensors (B, ...)."""
    tokens, pooled, mask = text.encode(captions)
    if hasattr(model, "context_embedder"):
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}
    added = {"resolution": None, "aspect_ratio": None}
    return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "added_cond_kwargs": added}


def predict(model: Callable[..., Any], x: Tensor, sigma: Tensor, condition: dict[str, Any]) -> Tensor:
    """Predict the rectified-flow velocity noise - x_0 from x = (1 - sigma) x_0 + sigma noise, (B, 3, H, W); sigma is (B,)."""
    return cast("Tensor", model(hidden_states=x, timestep=sigma * 1000, return_dict=False, **condition)[0])


@torch.no_grad()
def sample(
    model: nn.Module,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = GUIDANCE,
    height: int = shapes.IMAGE_SIZE,
    width: int = shapes.IMAGE_SIZE,
) -> Tensor:
    """Sample images (B, 3, height, width) in [0, 1] for B captions, with Euler steps and classifier-free guidance.

    Raises:
        ValueError: a caption has unknown words, or too many.
    """
    x = torch.randn(len(captions), 3, height, width, generator=torch.Generator().manual_seed(seed))
    condition = conditions(model, [*captions, *[""] * len(captions)])
    sigmas = torch.linspace(1, 0, steps + 1)
    for now, after in itertools.pairwise(sigmas):
        v, v_empty = predict(model, torch.cat([x, x]), now.expand(2 * len(x)), condition).chunk(2)
        x = x + (after - now) * (v_empty + guidance * (v - v_empty))
    return (x / 2 + 0.5).clamp(0, 1)
