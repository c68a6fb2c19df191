"""What differs between diffusers' versions and settings: the attention kernel, and the name of the weights' type."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def native_attention() -> Iterator[None]:
    """Inside, diffusers' models use torch's own attention, whose node capture knows; the caller's choice is restored after."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None or not hasattr(dispatch, "_AttentionBackendRegistry"):
        yield
        return
    with dispatch.attention_backend(dispatch.AttentionBackendName.NATIVE):
        yield


def weights_in(dtype: torch.dtype | None) -> dict[str, Any]:
    """The option of `from_pretrained` that loads weights in a type (None: float32). diffusers has renamed it."""
    if dtype is None:
        return {}
    import diffusers

    major, minor = diffusers.__version__.split(".")[:2]
    return {"dtype" if (int(major), int(minor)) >= (0, 42) else "torch_dtype": dtype}
