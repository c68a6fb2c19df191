"""What the runner asks of data, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Split = Literal["train", "held-out"]


@dataclass(frozen=True)
class Request:
    """Rows of a global batch.

    Attributes:
        position: how many samples the stream has given before this batch.
        size: samples in the global batch.
        rows: those wanted, within `range(size)`.
        height, width: of the pictures, in pixels. A source with aspect-ratio buckets may answer with another shape of
            about this area, the same for all rows of a batch.
        split: "held-out" samples are never seen in training.
    """

    position: int
    size: int
    rows: range
    height: int
    width: int
    split: Split = "train"

    @property
    def positions(self) -> range:
        """The wanted rows' positions in the stream."""
        return range(self.position + self.rows.start, self.position + self.rows.stop)


@dataclass(frozen=True)
class Batch:
    """What the transformer is trained on.

    Attributes:
        pictures: (B, C, H, W), clean, in the model's latent space and scale, on the CPU.
        conditions: keyword arguments of the model's forward that carry the captions; tensors are (B, ...).
        captions: in words, if the source knows them; for the eye.
    """

    pictures: Tensor
    conditions: dict[str, Any]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """What a source may use of the run.

    Attributes:
        model: the transformer whose conditions are wanted.
        seed: of everything that is random.
        base: where its pipeline is: a folder, a hub id or a demo model's name.
        device, dtype: of encoders.
    """

    model: nn.Module
    seed: int
    base: str | None
    device: torch.device
    dtype: torch.dtype


class Source(Protocol):
    """A deterministic stream of samples.

    Attributes:
        skipped: the samples that could not be read so far, by name, with the reason.
        concurrent: whether `batch` may run in another thread while the model trains: it must not if it calls the model
            itself. Random numbers must come from generators of its own either way.
    """

    skipped: dict[str, str]
    concurrent: bool

    def check(self, height: int, width: int) -> None:
        """
        Raises:
            DistillError: pictures of this resolution in pixels cannot be had.
        """
        ...

    def batch(self, request: Request) -> Batch:
        """The requested rows, in order: a function of the request alone.

        Raises:
            DistillError: nothing can be read any more.
        """
        ...

    def pixels(self, pictures: Tensor) -> Tensor | None:
        """Pictures of the model's space (B, C, H, W) for the eye: (B, 3, height, width) in [0, 1]. None if nothing can decode them."""
        ...
