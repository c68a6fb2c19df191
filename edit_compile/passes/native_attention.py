"""Capture under torch's own attention: other backends of diffusers hide the attention node from the graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CHOSEN = "_attention_backend"  # of an attention processor, by `set_attention_backend` of its model


@contextmanager
def native_attention(model: nn.Module) -> Iterator[None]:
    """Have a model of diffusers use torch's own attention inside, whose node capture knows; the caller's choice is restored after."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None or not hasattr(dispatch, "attention_backend"):
        yield
        return
    processors = [processor for module in model.modules() if (processor := getattr(module, "processor", None)) is not None]
    chosen = [(processor, getattr(processor, _CHOSEN)) for processor in processors if getattr(processor, _CHOSEN, None) is not None]
    try:
        for processor, _ in chosen:
            setattr(processor, _CHOSEN, None)
        with dispatch.attention_backend(dispatch.AttentionBackendName.NATIVE):
            yield
    finally:
        for processor, backend in chosen:
            setattr(processor, _CHOSEN, backend)
