"""Accelerate's trackers, which record the recipe and every number of a row."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from edit_compile.distillation.recipe.schema import Recipe, flatten
from edit_compile.errors import DistillError
from edit_compile.words import without_paths

_PACKAGES = {"comet_ml": "comet-ml"}  # where a package has another name than its module


def chosen_trackers(names: Sequence[str] | None) -> list[str]:
    """Return the trackers named, or TensorBoard if that is None.

    Raises:
        DistillError: one is not installed.
    """
    if names is None:
        return ["tensorboard"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise DistillError(f"trackers: {name} is not installed: pip install {_PACKAGES.get(name, name)}")
    return list(names)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Flatten a recipe to what trackers take: dotted keys to plain values."""
    content = flatten(without_paths(recipe.model_dump(mode="json")))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in content.items()}
