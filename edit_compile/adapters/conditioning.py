"""What a model is given besides noisy latents and captions: an image to edit, to fill or to follow."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from edit_compile.adapters.family import DiffusionFamily, lookup_family
from edit_compile.adapters.hub_access import hub_file
from edit_compile.adapters.load_model import LoadedModel
from edit_compile.adapters.pipelines import PIPELINE_INDEX
from edit_compile.files import read_small

_IMAGES = ("image", "images", "control_image", "mask_image", "video")  # of pipelines' calls
_MADE_FOR_TEXT_ALONE_TOO = ("Flux2Pipeline", "Flux2KleinPipeline")


def image_condition(loaded: LoadedModel) -> str | None:
    """Say which image a model is given besides its noisy latents and captions, from its configuration alone; None if it is given none."""
    return _in_channels(loaded.model) or (_in_pipeline(loaded.pipeline) if loaded.pipeline is not None else None)


def _in_channels(model: nn.Module) -> str | None:
    family = lookup_family(model)
    given = family.given_channels(model) if isinstance(family, DiffusionFamily) else 0
    return f"{type(model).__name__} takes {given} channels of an image besides its noisy latents" if given else None


def _in_pipeline(name: str) -> str | None:
    kind = _pipeline_class(name)
    if kind is None or kind.__name__ in _MADE_FOR_TEXT_ALONE_TOO:
        return None
    taken = [parameter for parameter in inspect.signature(kind.__call__).parameters if parameter in _IMAGES]
    return f"{kind.__name__} takes {' and '.join(taken)} besides captions" if taken else None


def _pipeline_class(name: str) -> Any:
    """Find the class of a folder's or hub id's pipeline; None if it is none of diffusers, or cannot be found out."""
    import diffusers

    index = Path(name) / PIPELINE_INDEX
    try:
        path = index if Path(name).is_dir() else hub_file(name, index.name)
        return getattr(diffusers, json.loads(read_small(path))["_class_name"], None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
