"""The teacher's own samples, as latents: made by its pipeline, with the pipeline's own scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.encoders import load_parts
from edit_compile.adapters.family import Size, TextToImageFamily, known_classes, lookup_family
from edit_compile.demo import models as demo
from edit_compile.errors import DistillError

LatentSampler = Callable[[Sequence[str], Size, Sequence[int]], Tensor]  # B captions, a size in pixels, B seeds -> (B, C, H, W)
_DEMO_OPTIONS = {"num_inference_steps": "steps", "guidance_scale": "guidance"}


def make_sampler(model: nn.Module, base: str | None, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> LatentSampler:
    """Make a function that samples with the model in the state it is in when called, on the device.

    Args:
        base: a demo model's name, or the pipeline's folder or hub id.
        options: `num_inference_steps`, `guidance_scale` and `max_sequence_length` of the pipeline; those left out have its defaults.

    Raises:
        DistillError: there is no pipeline, it cannot be loaded, or the family is not known.
    """
    if base in demo.SOURCES:
        return _demo_sampler(model, options)
    family = lookup_family(model)
    if base is None or not isinstance(family, TextToImageFamily):
        known = known_classes(TextToImageFamily)
        raise DistillError(f"cannot sample from a {type(model).__name__}: its pipeline is not known (known: {known})")
    pipe = load_parts(base, dtype, model).to(device)

    def sample(captions: Sequence[str], size: Size, seeds: Sequence[int]) -> Tensor:
        height, width = size
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        fixed = {"height": height, "width": width, "generator": generators, "output_type": "latent", **family.pipeline_options}
        return family.unpack_samples(pipe, pipe(prompt=list(captions), **fixed, **options).images, size).float().cpu()

    return sample


def _demo_sampler(model: nn.Module, options: dict[str, Any]) -> LatentSampler:
    chosen = {_DEMO_OPTIONS[name]: value for name, value in options.items() if name in _DEMO_OPTIONS}

    def sample(captions: Sequence[str], size: Size, seeds: Sequence[int]) -> Tensor:
        height, width = size
        pairs = zip(captions, seeds, strict=True)
        images = [demo.sample(model, [caption], seed=seed, height=height, width=width, **chosen) for caption, seed in pairs]
        return torch.cat(images) * 2 - 1

    return sample
