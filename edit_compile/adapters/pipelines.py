"""diffusers' pipelines: loading one, which component denoises, where a model came from, the dtype of loaded weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.hub_access import ALIASES, download_error, hub_access

DENOISERS = ("transformer", "unet")  # what pipelines call the network that denoises


def load_diffusers_pipeline(base: str, **options: Any) -> Any:
    """Load a pipeline from a folder or the hub; `options` are those of `DiffusionPipeline.from_pretrained`.

    Raises:
        ModelNotFoundError: it is not cached, and the hub cannot be reached. All else is raised as diffusers does.
    """
    from diffusers import DiffusionPipeline

    with hub_access(base) as online:
        try:
            return DiffusionPipeline.from_pretrained(ALIASES.get(base, base), **options)
        except OSError as error:
            if online:
                raise
            raise download_error(base, error, online) from error


def origin_of(model: Any) -> str | None:
    """Return the hub id or folder that a model or pipeline was loaded from, or None if it does not remember."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return str(name) if name else None


def denoiser_name(pipeline: Any) -> str | None:
    """Name the component of a pipeline that denoises; None if it has none."""
    return next((name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)), None)


def denoiser_of(pipeline: Any) -> nn.Module | None:
    """Return the component of a pipeline that denoises, if it has one."""
    name = denoiser_name(pipeline)
    return None if name is None else getattr(pipeline, name)


def with_denoiser(pipeline: Any, model: nn.Module) -> Any:
    """Return a pipeline with the same components and settings but another denoiser."""
    changed = copy.copy(pipeline)
    changed.register_modules(**{denoiser_name(pipeline) or DENOISERS[0]: model})
    return changed


def dtype_kwarg(dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the keyword argument of `from_pretrained` that loads weights in a dtype (None: float32); diffusers 0.42 renamed it."""
    if dtype is None:
        return {}
    import diffusers

    major, minor = diffusers.__version__.split(".")[:2]
    return {"dtype" if (int(major), int(minor)) >= (0, 42) else "torch_dtype": dtype}
