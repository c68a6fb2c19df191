"""Images to latents in a model's own scale, and back, for the VAEs of diffusers' pipelines.

Pipelines scale latents in one of three ways, which the VAE's config or modules tell: a shift and a factor for all channels
(SD3, FLUX.1), a mean and a standard deviation for each (Qwen-Image, Wan), or the statistics of a batch norm over 2 x 2 patches
(FLUX.2). VAEs of videos take images as videos of one frame.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode(vae: Any, images_B3HW: Tensor) -> Tensor:
    """Encode images in [-1, 1] to latents (B, C, h, w) in the model's scale: the mode of the VAE's distribution."""
    images = images_B3HW.to(vae.device, vae.dtype)
    encoded = vae.encode(images[:, :, None] if takes_videos(vae) else images)
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return normalized(vae, latents[:, :, 0] if latents.ndim == 5 else latents)


def decode(vae: Any, latents_BChw: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) in the model's scale to images (B, 3, H, W) in [-1, 1], up to rounding."""
    latents = denormalized(vae, latents_BChw.to(vae.device, vae.dtype))
    images: Tensor = vae.decode(latents[:, :, None] if takes_videos(vae) else latents, return_dict=False)[0]
    return images[:, :, 0] if images.ndim == 5 else images


def takes_videos(vae: nn.Module) -> bool:
    """Return whether a VAE convolves over time too."""
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def normalized(vae: Any, latents: Tensor) -> Tensor:
    """Bring a VAE's latents (B, C, h, w) to the model's scale."""
    norm = _patch_norm(vae)
    if norm is not None:
        return _standardized(F.pixel_unshuffle(latents, 2), norm)
    shift, scale = _shift_and_scale(vae, latents)
    return (latents - shift) * scale


def denormalized(vae: Any, latents: Tensor) -> Tensor:
    """Undo `normalized`."""
    norm = _patch_norm(vae)
    if norm is not None:
        return F.pixel_shuffle(_restored(latents, norm), 2)
    shift, scale = _shift_and_scale(vae, latents)
    return latents / scale + shift


def _patch_norm(vae: nn.Module) -> nn.BatchNorm2d | None:
    """Return the batch norm whose statistics scale patches of 2 x 2 latents, if the VAE has one."""
    return next((module for module in vae.children() if isinstance(module, nn.BatchNorm2d)), None)


def _statistics(norm: nn.BatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
    deviation = (variance + norm.eps).sqrt()
    return mean.view(1, -1, 1, 1).to(like), deviation.view(1, -1, 1, 1).to(like)


def _standardized(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, deviation = _statistics(norm, x)
    return (x - mean) / deviation


def _restored(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, deviation = _statistics(norm, x)
    return x * deviation + mean


def _shift_and_scale(vae: Any, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    mean, deviation = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and deviation is not None:
        shape = (1, -1, *[1] * (like.ndim - 2))
        return torch.tensor(mean).to(like).view(shape), 1 / torch.tensor(deviation).to(like).view(shape)
    return getattr(vae.config, "shift_factor", None) or 0.0, getattr(vae.config, "scaling_factor", None) or 1.0
