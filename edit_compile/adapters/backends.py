"""diffusers' choice of attention kernel: capture needs the native one, whose node is scaled_dot_product_attention."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_attention() -> Iterator[None]:
    """Inside, diffusers' models use torch's own attention; the caller's choice is restored after."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None or not hasattr(dispatch, "_AttentionBackendRegistry"):
        yield
        return
    with dispatch.attention_backend(dispatch.AttentionBackendName.NATIVE):
        yield
