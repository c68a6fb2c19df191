"""Capture under torch's own attention: other backends of diffusers hide the attention node from the graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_attention() -> Iterator[None]:
    """Have diffusers' models use torch's own attention inside, whose node capture knows; the caller's choice is restored after."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None or not hasattr(dispatch, "attention_backend"):
        yield
        return
    with dispatch.attention_backend(dispatch.AttentionBackendName.NATIVE):
        yield
