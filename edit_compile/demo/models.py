"""The demo transformers, four for images and one for video: their configurations, how to call them, and how to sample from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from edit_compile.demo import groups, motion, shapes, text
from edit_compile.demo.names import IMAGE_NAMES as IMAGE_NAMES
from edit_compile.demo.names import LARGE_NAMES as LARGE_NAMES
from edit_compile.demo.names import NAMES as NAMES
from edit_compile.demo.names import SOURCES as SOURCES
from edit_compile.demo.names import VIDEO_NAME as VIDEO_NAME

if TYPE_CHECKING:
    from diffusers import ModelMixin

GUIDANCE = 2.0
RGB, _WAVES = 3, 2
_DIRECTIONS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 1, 0), (-0.5, 1, 0), (0.5, 0, 1), (-0.5, 0, 1))  # of time, rows, columns
POSITION_CHANNELS = len(_DIRECTIONS) * 2 * _WAVES  # that the video model is given with a clip


class TrainingData(NamedTuple):
    """What a demo model was trained on: samples of this side in pixels, and captions of these words, so many at most."""

    side: int
    vocabulary: Sequence[str]
    text_length: int


SHAPES = TrainingData(shapes.IMAGE_SIZE, text.VOCABULARY, text.TEXT_LENGTH)
GROUPS = TrainingData(groups.IMAGE_SIZE, text.GROUP_VOCABULARY, text.GROUP_TEXT_LENGTH)
CLIPS = TrainingData(motion.SIDE, text.MOTION_VOCABULARY, text.TEXT_LENGTH)


def folder(name: str) -> Path:
    """Return the folder with the trained model's `config.json` and weights."""
    return Path(__file__).parent / name


def side_and_patch(source: str) -> tuple[int, int]:
    """Return the side of a demo model's training data, and what sides must be multiples of, in pixels; `source` is demo/NAME."""
    name = source.removeprefix("demo/")
    return (CLIPS.side, 4) if name == VIDEO_NAME else (GROUPS.side if name in LARGE_NAMES else SHAPES.side, 2)


def untrained(name: str) -> ModelMixin:
    """Make a freshly initialised demo model: `mm-dit`, `mm-dit-64` (SD3's transformer), `dit`, `dit-64` (PixArt's), `video-dit` (Wan's).

    Raises:
        ValueError: there is no model of that name.
    """
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel

    side = GROUPS.side if name in LARGE_NAMES else SHAPES.side
    if name in ("mm-dit", "mm-dit-64"):
        return SD3Transformer2DModel(
            sample_size=side,
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
    if name in ("dit", "dit-64"):
        return PixArtTransformer2DModel(
            sample_size=side,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=5 if name == "dit" else 6,
            attention_head_dim=32,
            num_attention_heads=3,
            cross_attention_dim=96,
            caption_channels=text.TEXT_CHANNELS,
            norm_num_groups=32,
            use_additional_conditions=False,
            interpolation_scale=1,
        )
    if name == VIDEO_NAME:
        return WanTransformer3DModel(
            patch_size=(1, 4, 4),
            num_attention_heads=3,
            attention_head_dim=32,
            in_channels=RGB + POSITION_CHANNELS,
            out_channels=RGB,
            text_dim=text.TEXT_CHANNELS,
            freq_dim=128,
            ffn_dim=384,
            num_layers=4,
        )
    raise ValueError(f"no demo model {name!r}; there are: {', '.join(NAMES)}")


def conditions(model: nn.Module, captions: Sequence[str]) -> dict[str, Any]:
    """Make the keyword arguments of the model's forward that carry B captions, tensors (B, ...).

    Raises:
        ValueError: a caption has words that the model was not trained with, or too many.
    """
    data = trained_on(model)
    tokens, pooled, mask = text.encode(captions, data.vocabulary, data.text_length)
    if draws_video(model):
        return {"encoder_hidden_states": tokens}
    if hasattr(model, "context_embedder"):
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}
    added = {"resolution": None, "aspect_ratio": None}
    return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "added_cond_kwargs": added}


def trained_on(model: nn.Module) -> TrainingData:
    """Return what a demo model was trained on."""
    if draws_video(model):
        return CLIPS
    return GROUPS if getattr(getattr(model, "config", None), "sample_size", None) == GROUPS.side else SHAPES


def draws_video(model: nn.Module) -> bool:
    """Return whether a demo model draws clips (B, 3, frames, H, W), not images (B, 3, H, W)."""
    return hasattr(model, "patch_embedding")


def predict(model: Callable[..., Any], x: Tensor, sigma: Tensor, condition: dict[str, Any]) -> Tensor:
    """Predict the rectified-flow velocity noise - x_0 from x = (1 - sigma) x_0 + sigma noise, (B, 3, ...); sigma is (B,)."""
    x = with_positions(x) if x.ndim == 5 else x
    return cast("Tensor", model(hidden_states=x, timestep=sigma * 1000, return_dict=False, **condition)[0])


def with_positions(x: Tensor) -> Tensor:
    """Append the channels that tell the video model where a pixel is: clips (B, 3, T, H, W) to (B, 31, T, H, W).

    They are the sines and cosines of plane waves, along the axes and along directions in which something moves. Wan's attention
    knows relative positions only; full-size models find the border by their VAE's latents, which pixels do not tell.
    """
    axes = [torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) * (torch.pi / 2) for size in x.shape[2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    phases = torch.einsum("da,athw->dthw", torch.tensor(_DIRECTIONS, dtype=x.dtype, device=x.device), places)
    waves = torch.cat([wave(number * phases) for number in range(1, _WAVES + 1) for wave in (torch.sin, torch.cos)])
    return torch.cat([x, waves.expand(len(x), -1, -1, -1, -1)], 1)


@torch.no_grad()
def sample(
    model: nn.Module,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = GUIDANCE,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Sample B captions' images (B, 3, height, width), or clips (B, 3, 8, height, width), in [0, 1].

    Euler steps with classifier-free guidance. The default sides are those of the training data.

    Raises:
        ValueError: a caption has unknown words, or too many.
    """
    frames, side = (motion.FRAMES,) if draws_video(model) else (), trained_on(model).side
    device = next(model.parameters()).device
    x = torch.randn(len(captions), 3, *frames, height or side, width or side, generator=torch.Generator().manual_seed(seed)).to(device)
    condition = conditions(model, [*captions, *[""] * len(captions)])
    condition = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in condition.items()}
    sigmas = torch.linspace(1, 0, steps + 1, device=device)
    for now, after in itertools.pairwise(sigmas):
        v, v_empty = predict(model, torch.cat([x, x]), now.expand(2 * len(x)), condition).chunk(2)
        x = x + (after - now) * (v_empty + guidance * (v - v_empty))
    return (x / 2 + 0.5).clamp(0, 1).cpu()
