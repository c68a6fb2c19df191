"""What the run asks of its data, and what it gets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class BatchRequest:
    """Rows of a global batch.

    Attributes:
        position: how many samples of the stream come before this batch.
        size: samples in the global batch.
        rows: the rows wanted, within `range(size)`.
        height, width: of the images, in pixels. A source with aspect-ratio buckets may answer with another shape of
            about this area, the same for all rows of a batch.
        split: "validation" samples are never seen in training.
        frames: of the videos; None for images, and for as many frames as are usual.
        empty_captions: give all samples the empty caption in the place of their own, as guidance needs.
    """

    position: int
    size: int
    rows: range
    height: int
    width: int
    split: Split = "train"
    frames: int | None = None
    empty_captions: bool = False

    @property
    def positions(self) -> range:
        """The positions of the wanted rows in the stream."""
        return range(self.position + self.rows.start, self.position + self.rows.stop)


@dataclass(frozen=True)
class Batch:
    """What the transformer is trained on.

    Attributes:
        latents: (B, C, H, W), of videos (B, C, T, H, W), without noise, in the model's latent space and scale, on the CPU.
        conditions: keyword arguments of the model's forward that carry the captions; tensors are (B, ...).
        captions: as text, if the source knows them, for sample grids.
    """

    latents: Tensor
    conditions: dict[str, Any]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordedCalls:
    """Calls of the model as its pipeline made them.

    Attributes:
        arguments: keyword arguments of one forward for all B of them, on the CPU.
        timesteps: (B,), in [0, 1000): how far from the end of sampling they are.
    """

    arguments: dict[str, Any]
    timesteps: Tensor


@dataclass(frozen=True)
class SourceContext:
    """What a source may use of the run.

    Attributes:
        model: the transformer whose conditions are wanted; if it is converted, its teacher makes what has to be sampled.
        seed: of everything that is random.
        base: where its pipeline is: a folder, a hub id or a demo model's name.
        device, dtype: of encoders.
    """

    model: nn.Module
    seed: int
    base: str | None
    device: torch.device
    dtype: torch.dtype


class DataSource(Protocol):
    """A deterministic stream of samples.

    Attributes:
        skipped: the samples that could not be read so far, by name, with the reason.
        concurrent: whether `batch` may run in another thread while the model trains. It must not if it calls the model
            itself. Random numbers must come from generators of its own either way.
    """

    skipped: dict[str, str]
    concurrent: bool

    def check(self, height: int, width: int, frames: int | None = None) -> None:
        """Raise DistillError if there are no images of this resolution in pixels, or no videos of so many frames."""
        ...

    def batch(self, request: BatchRequest) -> Batch:
        """Return the requested rows, in order; the answer depends on the request alone.

        Raises:
            DistillError: nothing can be read any more.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor | None:
        """Decode latents (B, C, H, W) to images in [0, 1], (B, 3, height, width); those of videos to (B, 3, frames, height, width).

        None if nothing here can decode them.
        """
        ...


def check_size(source: DataSource, height: int, width: int, frames: int | None) -> None:
    """Let a source check a size in pixels. One of images need not take a number of frames.

    Raises:
        DistillError: as `DataSource.check`.
    """
    source.check(height, width, *(() if frames is None else (frames,)))


@dataclass(frozen=True)
class DataSummary:
    """What a source has at one resolution.

    Attributes:
        found, held_out, skipped: samples; those that are trained on are the others.
        shapes: by shape in pixels, how many are trained on.
    """

    found: int
    held_out: int
    skipped: int
    shapes: dict[tuple[int, int], int]

    def __str__(self) -> str:
        shapes = ", ".join(f"{height} x {width}: {count:,}" for (height, width), count in self.shapes.items())
        trained = f"{sum(self.shapes.values()):,} to train on ({shapes} px)"
        return f"data: {self.found:,} found, {trained}, {self.held_out:,} held out, {self.skipped:,} skipped"

    def to_dict(self) -> dict[str, Any]:
        shapes = {f"{height}x{width}": count for (height, width), count in self.shapes.items()}
        return {"found": self.found, "held_out": self.held_out, "skipped": self.skipped, "shapes": shapes}


@runtime_checkable
class ChangingSource(Protocol):
    """A source of data that may have changed when a run continues."""

    def fingerprint(self) -> str:
        """Return what changes when samples are added, removed or renamed, or their files change in size."""
        ...


@runtime_checkable
class FiniteSource(ChangingSource, Protocol):
    """A source of a known number of samples."""

    def summary(self, height: int, width: int) -> DataSummary:
        """Count the samples at a resolution in pixels.

        Raises:
            DistillError: none of them can be read.
        """
        ...

    def held_out_names(self) -> list[str]:
        """Return the names of the samples that are never trained on."""
        ...

    def hold_out(self, names: Collection[str]) -> None:
        """Never train on the samples of these names, instead of those that were chosen.

        Raises:
            DistillError: no sample has any of these names, or all have.
        """
        ...


@runtime_checkable
class CallSource(Protocol):
    """A source of calls of the model instead of images."""

    def recorded(self, request: BatchRequest, timesteps: Tensor) -> RecordedCalls:
        """Return the calls of the requested rows, in order, those nearest to timesteps (B,); the answer depends on both alone.

        Raises:
            DistillError: they cannot be recorded, or not be put into one batch.
        """
        ...
