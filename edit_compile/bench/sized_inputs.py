"""The inputs of a converted model's forward at a size in pixels: by its family's adapter, or as its pipeline makes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from edit_compile.adapters.family import DEFAULT_SIDES, Extent, lookup_family
from edit_compile.adapters.inputs import default_sizes, inputs_for_size
from edit_compile.adapters.pipeline_calls import FRAMES, batch_size
from edit_compile.adapters.pipeline_structure import pipeline_structure
from edit_compile.adapters.record_inputs import one_sample, record
from edit_compile.errors import GridError
from edit_compile.passes.capture import meta_inputs
from edit_compile.student.grid import grid, grid_of_inputs
from edit_compile.student.grid_sources import Grids


@dataclass(frozen=True)
class SizedInputs:
    """One forward at a size.

    Attributes:
        inputs: keyword arguments of the forward, on the meta device.
        batch: samples in it; guidance makes two of an image.
        grids: of image tokens: of the image, or of each of several.
        text: number of text tokens; None if unknown.
        frames: of a video; None for an image.
    """

    inputs: dict[str, Any]
    batch: int
    grids: Grids
    text: int | None
    frames: int | None

    @property
    def image_tokens(self) -> int:
        """The number of image tokens of a sample."""
        return sum(math.prod(sizes) for sizes in self.grids)

    @contextmanager
    def stated(self, student: nn.Module) -> Iterator[None]:
        """State the grid for forwards inside."""
        with grid(student, *self.grids):
            yield


def usual_sizes(student: nn.Module) -> tuple[Extent, ...]:
    """Return the sizes in pixels that the model is usually used at; of a model that no adapter knows, squares up to 4096."""
    return default_sizes(student) if lookup_family(student) is not None else tuple((side, side) for side in DEFAULT_SIDES)


class InputMaker:
    """Makes the inputs of a converted model at any size."""

    def __init__(self, student: nn.Module, pipeline: str | None, call: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            pipeline: the model's, a folder or hub id; only needed where no adapter knows the model.
            call: keyword arguments of the pipeline's call, to have inputs as it makes them for one sample, adapter or not.
        """
        self.student, self.call = student, call
        asked = pipeline is not None and (call is not None or lookup_family(student) is None)
        self.pipe = pipeline_structure(pipeline) if pipeline is not None and asked else None

    def at(self, size: Extent, text: int | None = None) -> SizedInputs:
        """Make the inputs at (height, width), or of videos (frames, height, width), in pixels.

        Raises:
            GridError: the model does not support this size; says why.
            NoExampleInputsError: no adapter knows the model, and its pipeline is unknown or fails.
        """
        *frames, height, width = size
        if self.pipe is None:
            made = inputs_for_size(self.student, height, width, frames=frames[0] if frames else None, text=text)
            return SizedInputs(meta_inputs(made.inputs), 1, (made.grid,), made.text, made.frames)
        options = {**(self.call or {}), **({FRAMES: frames[0]} if frames else {})}
        recorded = record(self.pipe, height=height, width=width, **(one_sample(self.pipe) if self.call is not None else {}), **options)
        grids = grid_of_inputs(self.student, recorded)
        if grids is None:
            raise GridError(f"{type(self.student).__name__}: its grid of image tokens does not follow from what its pipeline passes")
        return SizedInputs(meta_inputs(recorded), batch_size(recorded), grids, None, frames[0] if frames else None)
