"""The interface of a model family, and the look-up of a model's family by its class name. Only adapters match names.

A new family is one module that defines FAMILY, and one line in `_MODULES`. Family modules are imported when first looked up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from edit_compile.demo import models as demo

VAE_SCALE, RGB = 8, 3
VAE_FRAMES = 4  # frames that a video VAE makes one of, after the first
DEFAULT_SIDES = (1024, 2048, 4096)  # pixels
Size = tuple[int, int]  # height and width in pixels, or rows and columns of image tokens
Extent = tuple[int, ...]  # a Size, or of videos (frames, height, width): in pixels, or in image tokens

_MODULES = {
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "z_image",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "WanTransformer3DModel": "wan",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "DiTTransformer2DModel": "dit",
    "VisionTransformer": "timm_vit",
}


@dataclass(frozen=True)
class InputSizes:
    """The sizes of one forward's tensors, and how they are made: random, or empty on the meta device.

    Attributes:
        text: number of text tokens.
        rows, columns: of image tokens.
        frames: of image tokens; 1 for images.
    """

    batch: int
    text: int
    rows: int
    columns: int
    device: torch.device
    dtype: torch.dtype
    frames: int = 1

    def floats(self, *shape: int) -> Tensor:
        """Make a tensor (B, *shape)."""
        make = torch.empty if self.device.type == "meta" else torch.randn
        return make((self.batch, *shape), dtype=self.dtype, device=self.device)

    def integers(self) -> Tensor:
        """Make zeros (B,) of int64."""
        return torch.zeros(self.batch, dtype=torch.int64, device=self.device)


class Family(ABC):
    """A model family: the inputs of a forward, and the image sizes its models can take."""

    @abstractmethod
    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        """Make the keyword arguments of one forward."""

    @abstractmethod
    def pixels_per_token(self, model: Any) -> int:
        """Return how many pixels of the finished image an image token spans, each way."""

    @abstractmethod
    def default_sizes(self, model: Any) -> tuple[Extent, ...]:
        """Return the image sizes (height, width) in pixels, or (frames, height, width), that the model is usually used at."""

    def default_frames(self, model: Any) -> int | None:
        """Return how many frames the videos usually have that the model makes; None for a model of images."""
        return None

    def token_frames(self, model: Any, frames: int) -> int | None:
        """Return how many frames of image tokens stand for a video's frames; None if the model cannot take so many."""
        return None

    def text_tokens(self, model: Any) -> int:
        """Return how many text tokens the model's pipeline passes."""
        return 0

    def size_limit(self, model: Any, rows: int, columns: int) -> str | None:
        """Say why the model cannot take a grid of rows x columns image tokens; None if it can."""
        return None

    def example_grid(self, model: Any) -> Extent:
        """Return the rows and columns, or frames, rows and columns, of image tokens to capture the model with.

        No two sizes should be equal and none 1: equal sizes would merge in the graph. Nor may image and text tokens together be as many
        as the model has channels.
        """
        return 10, 14


class DiffusionFamily(Family):
    """A family of diffusers' denoising transformers: `hidden_states` (B, C, H, W) and `timestep` (B,) in [0, 1000).

    Latents of videos are (B, C, T, H, W).
    """

    denoise_arguments: ClassVar[Sequence[str]] = ("hidden_states", "timestep", "return_dict")  # those `denoise` passes itself

    def denoise(self, model: Any, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Call the model once; returns its prediction (B, C, H, W), without the variance that some predict in further channels."""
        prediction = model(hidden_states=x_BCHW, timestep=timesteps_B, return_dict=False, **conditions)[0]
        return cast("Tensor", prediction)[:, : x_BCHW.shape[1]]

    def conditions(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of `inputs` are conditions, as `denoise` takes them."""
        return {name: value for name, value in inputs.items() if name not in self.denoise_arguments}

    def latents(self, inputs: Mapping[str, Any], grid: Extent) -> Tensor:
        """Return the noisy latents (B, C, H, W) of `inputs`, made for a grid of image tokens."""
        return cast("Tensor", inputs["hidden_states"])

    def given_channels(self, model: Any) -> int:
        """Return how many channels of the model's input are no noisy latents, since it predicts none of them: an image that it is given."""
        return max(int(model.config.in_channels) - int(getattr(model.config, "out_channels", None) or model.config.in_channels), 0)

    def random_latents(self, model: Any, sizes: InputSizes) -> Tensor:
        """Make the latents (B, C, H, W) of a model that cuts them into patches itself."""
        patch = model.config.patch_size
        return sizes.floats(model.config.in_channels, patch * sizes.rows, patch * sizes.columns)

    def pixels_per_token(self, model: Any) -> int:
        return int(model.config.patch_size) * (1 if is_pixel_space(model) else VAE_SCALE)

    def default_sizes(self, model: Any) -> tuple[Extent, ...]:
        """Return a pixel-space model's own size, twice and four times it; for latent models, squares of 1024, 2048 and 4096."""
        if is_pixel_space(model):
            return tuple((model.config.sample_size * n, model.config.sample_size * n) for n in (1, 2, 4))
        return tuple((side, side) for side in DEFAULT_SIDES)


class TextToImageFamily(DiffusionFamily):
    """A family whose pipeline encodes captions, has a VAE, and samples."""

    max_text_tokens: ClassVar[int]  # what the pipeline pads captions to
    pipeline_options: ClassVar[Mapping[str, Any]] = {}  # of the pipeline's call, for samples of exactly the size asked for

    @abstractmethod
    def encode_captions(self, pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
        """Return the conditions made of B captions, tensors (B, ...); `options` are those of the pipeline's `encode_prompt`."""

    def other_conditions(self, model: Any, size: Size, batch: int) -> dict[str, Any]:
        """Return the conditions that do not depend on captions, for images of a size in pixels."""
        return {}

    def latent_patch(self, model: Any) -> int:
        """Return how many latents a token spans, each way."""
        return int(model.config.patch_size)

    def unpack_samples(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        """Return what the pipeline gives for `output_type="latent"`, at a size in pixels, as (B, C, H, W)."""
        return latents

    def text_tokens(self, model: Any) -> int:
        return demo.trained_on(model).text_length if is_pixel_space(model) else self.max_text_tokens


def is_pixel_space(model: Any) -> bool:
    """Return whether a diffusers model works on pixels, not latents, as the demo models do."""
    return RGB in (model.config.in_channels, getattr(model.config, "out_channels", None))


def lookup_family(model: nn.Module) -> Family | None:
    """Find the family of the model's class, or of the nearest known class that it derives from, as converted models do from their own."""
    name = next((base.__name__ for base in type(model).__mro__ if base.__name__ in _MODULES), None)
    return _family(name) if name is not None else None


def makes_videos(model: nn.Module) -> bool:
    """Return whether a model is known, and known to make videos."""
    family = lookup_family(model)
    return family is not None and family.default_frames(model) is not None


def known_classes(kind: type) -> str:
    """List the model classes whose family is of a kind, for error messages: "A, B, C"."""
    return ", ".join(name for name in _MODULES if isinstance(_family(name), kind))


@cache
def _family(class_name: str) -> Family:
    module = import_module(f"edit_compile.adapters.{_MODULES[class_name]}")
    return cast("Family", module.FAMILY)


def frames_in_tokens(frames: int, patch: int, compression: int = VAE_FRAMES) -> int | None:
    """Return how many frames of image tokens stand for a video's frames; None if they are no whole number.

    Args:
        frames: of the video.
        patch: latent frames in one token.
        compression: frames that become one latent frame, after the first; 1 for a model without a VAE.
    """
    latents, rest = 1 + (frames - 1) // compression, (frames - 1) % compression
    return None if rest or latents % patch or latents < patch else latents // patch
