"""Example inputs for the known model families. Every other model brings its own, or records them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.family import Extent, Family, InputSizes, lookup_family
from edit_compile.errors import GridError, NoExampleInputsError

_EXAMPLE_BATCH, _EXAMPLE_TEXT = 2, 13


@dataclass(frozen=True)
class ImageInputs:
    """One forward for images or videos of a given size.

    Attributes:
        inputs: keyword arguments of the forward.
        grid: (rows, columns) of image tokens, or (frames, rows, columns).
        text: number of text tokens.
        frames: of the video; None for images.
    """

    inputs: dict[str, Any]
    grid: Extent
    text: int
    frames: int | None = None


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Make keyword arguments of one small forward, on the meta device in bfloat16 (position ids are real).

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    family = _family(model)
    *frames, rows, columns = family.example_grid(model)
    sizes = InputSizes(_EXAMPLE_BATCH, _EXAMPLE_TEXT, rows, columns, torch.device("meta"), torch.bfloat16, *frames)
    return family.inputs(model, sizes)


def inputs_for_size(
    model: nn.Module,
    height: int,
    width: int,
    *,
    frames: int | None = None,
    batch: int = 1,
    text: int | None = None,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> ImageInputs:
    """Make the inputs of one forward for images of height x width pixels: random, or empty on the meta device.

    Args:
        frames: of a model of videos; default: as many as its videos usually have.
        text: number of text tokens; default: as many as the model's pipeline passes.

    Raises:
        GridError: the model does not support this size; says why.
        NoExampleInputsError: the model's family has no adapter.
    """
    family, step = _family(model), pixels_per_token(model)
    frames = frames if frames is not None else family.default_frames(model)
    video = () if frames is None else (_token_frames(family, model, frames),)
    refused = f"{type(model).__name__} does not support {height} x {width} px"
    if min(height, width) < step or height % step or width % step:
        raise GridError(f"{refused}: both sides must be multiples of {step}, the pixels of a token")
    rows, columns = height // step, width // step
    reason = family.size_limit(model, rows, columns)
    if reason is not None:
        raise GridError(f"{refused}: {reason}")
    tokens = text if text is not None else family.text_tokens(model)
    sizes = InputSizes(batch, tokens, rows, columns, torch.device(device), dtype, *video)
    return ImageInputs(family.inputs(model, sizes), (*video, rows, columns), tokens, frames)


def tokens_of_size(model: nn.Module, height: int, width: int, frames: int | None = None) -> Extent:
    """Return the (rows, columns) of image tokens, or (frames, rows, columns), of an image or video of a size in pixels.

    Args:
        frames: of a model of videos; default: as many as its videos usually have.

    Raises:
        GridError: the model cannot make so many frames.
        NoExampleInputsError: the model's family has no adapter.
    """
    family, step = _family(model), pixels_per_token(model)
    frames = frames if frames is not None else family.default_frames(model)
    return (*(() if frames is None else (_token_frames(family, model, frames),)), height // step, width // step)


def check_frames(model: nn.Module, frames: int) -> None:
    """Raise GridError if a known model cannot make a video of so many frames; of unknown ones nothing is said."""
    family = lookup_family(model)
    if family is not None:
        _token_frames(family, model, frames)


def _token_frames(family: Family, model: nn.Module, frames: int) -> int:
    """Return how many frames of image tokens stand for a video's frames."""
    usual, found = family.default_frames(model), family.token_frames(model, frames)
    if found is not None:
        return found
    if usual is None:
        raise GridError(f"{type(model).__name__} makes images, not videos of {frames} frames: leave frames out")
    raise GridError(f"{type(model).__name__} does not support {frames} frames; it is usually used with {usual}")


def pixels_per_token(model: nn.Module) -> int:
    """Return how many pixels of the finished image an image token spans, each way.

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    return _family(model).pixels_per_token(model)


def default_sizes(model: nn.Module) -> tuple[Extent, ...]:
    """Return the sizes (height, width) in pixels, or (frames, height, width), that the model is usually used at.

    Not all need be possible.

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    return _family(model).default_sizes(model)


def _family(model: nn.Module) -> Family:
    family = lookup_family(model)
    if family is not None:
        return family
    raise NoExampleInputsError(
        f"no example inputs are known for {type(model).__name__}: give the pipeline that it is part of, or keyword arguments of one "
        "forward, example_inputs=dict(...) (inspect and convert: --example-inputs FILE); edit_compile.record(pipe, prompt=...) records them"
    )
