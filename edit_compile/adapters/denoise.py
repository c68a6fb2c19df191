"""One call of a diffusion transformer, whatever its family: noisy latents and timesteps in, prediction out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.family import DiffusionFamily, known_classes, lookup_family
from edit_compile.adapters.inputs import example_inputs, inputs_for_size
from edit_compile.errors import NoExampleInputsError


def denoise(model: nn.Module, x_BCHW: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """Predict from noisy latents, (B, C, H, W) to (B, C, H, W).

    Args:
        model: a transformer of a family known here, or a copy of one that was converted or wrapped.
        x_BCHW: in the model's latent space.
        timesteps_B: in [0, 1000).
        conditions: the forward's keyword arguments that carry the captions.

    Raises:
        NoExampleInputsError: the family has no adapter.
    """
    return _family(getattr(model, "module", model)).denoise(model, x_BCHW, timesteps_B, conditions)


def random_batch(
    model: nn.Module,
    height: int,
    width: int,
    batch: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    frames: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Make what `denoise` takes for images of height x width pixels: random (on the meta device, empty) x_BCHW and conditions.

    Args:
        frames: of a model of videos; default: as many as its videos usually have.

    Raises:
        GridError: the model does not support this size; says why.
        NoExampleInputsError: the model's family has no adapter.
    """
    family = _family(model)
    made = inputs_for_size(model, height, width, frames=frames, batch=batch, device=device, dtype=dtype)
    return family.latents(made.inputs, made.grid), family.conditions(made.inputs)


def misfit(model: nn.Module, latents: Tensor, conditions: Mapping[str, Any]) -> str | None:
    """Say which of latents (B, C, ...) and conditions a model cannot take, from its structure alone; None if it can.

    Of models whose family is not known, nothing is said.
    """
    family = lookup_family(model)
    if not isinstance(family, DiffusionFamily):
        return None
    inputs, name = example_inputs(model), type(model).__name__
    taken = family.latents(inputs, family.example_grid(model))
    if latents.ndim != taken.ndim:
        return f"{name} takes {'videos' if taken.ndim == 5 else 'images'}, not {'videos' if latents.ndim == 5 else 'images'}"
    if latents.shape[1] != taken.shape[1]:
        return f"{name} takes latents of {taken.shape[1]} channels, not {latents.shape[1]}"
    for key, tensor in family.conditions(inputs).items():
        given = conditions.get(key)
        if (
            isinstance(tensor, Tensor)
            and isinstance(given, Tensor)
            and tensor.ndim == given.ndim == 3
            and tensor.shape[2] != given.shape[2]
        ):
            return f"{name} takes {key} of {tensor.shape[2]} channels, not {given.shape[2]}"
    return None


def _family(model: nn.Module) -> DiffusionFamily:
    family = lookup_family(model)
    if isinstance(family, DiffusionFamily):
        return family
    raise NoExampleInputsError(
        f"how to call a {type(model).__name__} is not known (known: {known_classes(DiffusionFamily)}); "
        "pass denoise=, a function of model, noisy latents, timesteps and conditions"
    )
