"""Example inputs for the known model families. Every other model brings its own, or records them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.family import Family, InputSizes, Size, known_classes, lookup_family
from edit_compile.errors import GridError, NoExampleInputsError

_EXAMPLE_BATCH, _EXAMPLE_TEXT = 2, 13


@dataclass(frozen=True)
class ImageInputs:
    """One forward for images of a given size.

    Attributes:
        inputs: keyword arguments of the forward.
        grid: (rows, columns) of image tokens.
        text: number of text tokens.
    """

    inputs: dict[str, Any]
    grid: Size
    text: int


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Make keyword arguments of one small forward, on the meta device in bfloat16 (position ids are real).

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    family = _family(model)
    sizes = InputSizes(_EXAMPLE_BATCH, _EXAMPLE_TEXT, *family.example_grid(model), torch.device("meta"), torch.bfloat16)
    return family.inputs(model, sizes)


def inputs_for_size(
    model: nn.Module,
    height: int,
    width: int,
    *,
    batch: int = 1,
    text: int | None = None,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> ImageInputs:
    """Make the inputs of one forward for images of height x width pixels: random, or empty on the meta device.

    Args:
        text: number of text tokens; default: as many as the model's pipeline passes.

    Raises:
        GridError: the model does not support this size; says why.
        NoExampleInputsError: the model's family has no adapter.
    """
    family, step = _family(model), pixels_per_token(model)
    refused = f"{type(model).__name__} does not support {height} x {width} px"
    if min(height, width) < step or height % step or width % step:
        raise GridError(f"{refused}: both sides must be multiples of {step}, the pixels of a token")
    rows, columns = height // step, width // step
    reason = family.size_limit(model, rows, columns)
    if reason is not None:
        raise GridError(f"{refused}: {reason}")
    tokens = text if text is not None else family.text_tokens(model)
    sizes = InputSizes(batch, tokens, rows, columns, torch.device(device), dtype)
    return ImageInputs(family.inputs(model, sizes), (rows, columns), tokens)


def pixels_per_token(model: nn.Module) -> int:
    """Return how many pixels of the finished image an image token spans, each way.

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    return _family(model).pixels_per_token(model)


def default_sizes(model: nn.Module) -> tuple[Size, ...]:
    """Return the image sizes (height, width) in pixels that the model is usually used at; not all need be possible.

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    return _family(model).default_sizes(model)


def _family(model: nn.Module) -> Family:
    family = lookup_family(model)
    if family is not None:
        return family
    raise NoExampleInputsError(
        f"no example inputs are known for {type(model).__name__} (known: {known_classes(Family)}); pass "
        "example_inputs=dict(...), keyword arguments of one forward, or record them: edit_compile.record(pipe, prompt=...)"
    )
