"""The teacher's own samples, as latents: drawn by its pipeline, with the pipeline's own scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.encoders import load_parts
from edit_compile.adapters.family import of_family
from edit_compile.demo import models as demo
from edit_compile.errors import DistillError

Draw = Callable[[Sequence[str], tuple[int, int], Sequence[int]], Tensor]  # captions, (height, width) in pixels, seeds -> (B, C, h, w)


def _as_they_are(pipe: Any, latents: Tensor, shape: tuple[int, int]) -> Tensor:
    return latents


def _unpacked(pipe: Any, latents: Tensor, shape: tuple[int, int]) -> Tensor:
    return pipe._unpack_latents(latents, *shape, pipe.vae_scale_factor)


_FAMILIES: dict[str, tuple[dict[str, Any], Callable[[Any, Tensor, tuple[int, int]], Tensor]]] = {
    "SD3Transformer2DModel": ({}, _as_they_are),
    "PixArtTransformer2DModel": ({"use_resolution_binning": False, "clean_caption": False}, _as_they_are),
    "FluxTransformer2DModel": ({}, _unpacked),
}


def make_drawer(model: nn.Module, base: str | None, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Draw:
    """A function that draws with the model as it is when called, on the device.

    Args:
        base: a demo model's name, or the pipeline's folder or hub id.
        options: `num_inference_steps`, `guidance_scale` and `max_sequence_length` of the pipeline; the defaults of those left out.

    Raises:
        DistillError: there is no pipeline, it cannot be loaded, or the family is not known.
    """
    if base in demo.SOURCES:
        return _demo_drawer(model, options)
    family = of_family(model, _FAMILIES)
    if base is None or family is None:
        raise DistillError(f"a {type(model).__name__} cannot draw samples: its pipeline is not known (known: {', '.join(_FAMILIES)})")
    (fixed, unpack), pipe = family, load_parts(base, dtype, model).to(device)

    def draw(captions: Sequence[str], shape: tuple[int, int], seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        height, width = shape
        called = {"prompt": list(captions), "height": height, "width": width, "generator": generators, "output_type": "latent"}
        return unpack(pipe, pipe(**called, **fixed, **options).images, shape).float().cpu()

    return draw


def _demo_drawer(model: nn.Module, options: dict[str, Any]) -> Draw:
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
    chosen = {names[name]: value for name, value in options.items() if name in names}

    def draw(captions: Sequence[str], shape: tuple[int, int], seeds: Sequence[int]) -> Tensor:
        height, width = shape
        drawn = [
            demo.sample(model, [caption], seed=seed, height=height, width=width, **chosen)
            for caption, seed in zip(captions, seeds, strict=True)
        ]
        return torch.cat(drawn) * 2 - 1

    return draw
