"""Accelerate's trackers: every number of a row, by name, at its step."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from edit_compile.errors import DistillError

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def chosen_trackers(names: Sequence[str] | None) -> list[str]:
    """Those named, or, if None, TensorBoard if it is installed.

    Raises:
        DistillError: one is not installed.
    """
    if names is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise DistillError(f"trackers: {name} is not installed: pip install {_PACKAGES[name]}")
    return list(names)
