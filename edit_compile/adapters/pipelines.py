"""diffusers' pipelines: loading one, which component denoises, where a model came from, the dtype of loaded weights."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.hub_access import download_error, hub_access, is_hub_error
from edit_compile.adapters.model_names import hub_id
from edit_compile.files import write_text

PIPELINE_INDEX = "model_index.json"  # the file that makes a folder a pipeline
NOTICE = "edit_compile"  # a key of a config
_NOTICE = "converted: here diffusers reads the original, with its original attention; edit_compile.load reads the converted model"
DENOISERS = ("transformer", "unet")  # what pipelines call the network that denoises


def load_diffusers_pipeline(base: str, **options: Any) -> Any:
    """Load a pipeline from a folder or the hub; `options` are those of `DiffusionPipeline.from_pretrained`.

    Raises:
        ModelNotFoundError: it is not cached, and the hub cannot be reached. All else is raised as diffusers does.
    """
    from diffusers import DiffusionPipeline

    repository, revision = (base, None) if Path(base).is_dir() else hub_id(base)
    with hub_access(base) as online:
        try:
            return DiffusionPipeline.from_pretrained(repository, revision=revision, **options)
        except Exception as error:
            if not is_hub_error(error) or (online and isinstance(error, OSError)):
                raise
            raise download_error(base, error, online) from error


def origin_of(model: Any) -> str | None:
    """Return the hub id or folder that a model or pipeline was loaded from, or None if it does not remember.

    Of a pipeline that was given another denoiser than its own, the denoiser's.
    """
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    denoiser = None if isinstance(model, nn.Module) else denoiser_of(model)
    own = None if denoiser is None else origin_of(denoiser)
    if own is not None and not (name and _is_part(own, str(name))):
        return own
    return str(name) if name else None


def _is_part(origin: str, pipeline: str) -> bool:
    """Say whether a model was loaded from a pipeline's folder or repository, given where both were loaded from."""
    folder = Path(pipeline)
    if folder.is_dir():
        return folder.resolve() in (Path(origin).resolve(), *Path(origin).resolve().parents)
    return origin == pipeline or f"models--{pipeline.replace('/', '--')}" in Path(origin).parts


def denoiser_name(pipeline: Any) -> str | None:
    """Name the component of a pipeline that denoises; None if it has none."""
    return next((name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)), None)


def denoiser_of(pipeline: Any) -> nn.Module | None:
    """Return the component of a pipeline that denoises, if it has one."""
    name = denoiser_name(pipeline)
    return None if name is None else getattr(pipeline, name)


def with_denoiser(pipeline: Any, model: nn.Module | None) -> Any:
    """Return a pipeline with the same components and settings but another denoiser, or none."""
    changed = copy.copy(pipeline)
    changed.register_modules(**{denoiser_name(pipeline) or DENOISERS[0]: model})
    return changed


def add_notice(config: Path) -> None:
    """Write into a model's config that it was converted: whoever loads the original alone is told, for diffusers warns of keys it does not
    know.
    """
    content = json.loads(config.read_text())
    write_text(config, json.dumps({**content, NOTICE: _NOTICE}, indent=2, sort_keys=True) + "\n")


@contextmanager
def notice_heard() -> Iterator[None]:
    """Leave out what diffusers says of the notice of `add_notice`."""
    logger = logging.getLogger("diffusers.configuration_utils")

    def others(record: logging.LogRecord) -> bool:
        return _NOTICE not in record.getMessage()

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def take_notice_off(model: Any) -> None:
    """Remove the notice of `add_notice` from a loaded model's config, so that it is not saved with the original."""
    config = getattr(model, "config", None)
    if isinstance(config, dict) and NOTICE in config:
        model._internal_dict = type(config)({key: value for key, value in config.items() if key != NOTICE})


def is_of_diffusers(kind: type) -> bool:
    """Say whether a class is one that `import diffusers` offers."""
    import diffusers

    return getattr(diffusers, kind.__name__, None) is kind


def dtype_kwarg(dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the keyword argument of `from_pretrained` that loads weights in a dtype (None: float32); diffusers 0.42 renamed it."""
    if dtype is None:
        return {}
    import diffusers

    major, minor = diffusers.__version__.split(".")[:2]
    return {"dtype" if (int(major), int(minor)) >= (0, 42) else "torch_dtype": dtype}
