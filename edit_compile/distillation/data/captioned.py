"""Captioned pictures, encoded as they are needed, in buckets of aspect ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes, fitted, nearest_shape
from edit_compile.distillation.data.records import Record, Unreadable, picture_of, size_of
from edit_compile.distillation.data.source import Batch
from edit_compile.frozen import Frozen


class CaptionedData(Frozen):
    """What all data of captioned pictures have in common.

    Attributes:
        buckets: aspect ratios; null to crop every picture to the stage's resolution.
        text_tokens: the longest caption in tokens of the pipeline's longest encoder. Default: the pipeline's own.
        caption_dropout: the share of samples whose caption is empty, which guidance needs.
        held_out: the number of samples that are never trained on. Default: a fiftieth of them, 8 to 256.
    """

    buckets: Buckets | None = Buckets()
    text_tokens: PositiveInt | None = None
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    held_out: PositiveInt | None = None

    def corpus(self, skipped: dict[str, str]) -> Corpus:
        """The records, by index; what cannot be read before any of them is asked for is added to `skipped`.

        Raises:
            DistillError: there are none.
        """
        raise NotImplementedError


class Corpus(Protocol):
    """Records by index. `record` raises Unreadable."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def record(self, index: int) -> Record: ...


class Encoder(Protocol):
    """Makes of captions and pictures what the transformer takes.

    Attributes:
        granularity: the sides of pictures must be multiples of it, in pixels.
    """

    granularity: int

    def check(self, caption: str) -> None:
        """Raises ValueError for a caption that cannot be encoded."""
        ...

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The conditions made of captions, tensors (B, ...) on the CPU."""
        ...

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """Pictures in [-1, 1] to latents (B, C, h, w) on the CPU, in the model's scale."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures in [0, 1], (B, 3, height, width) on the CPU."""
        ...

    def other_conditions(self, shape: Shape, size: int) -> dict[str, Any]:
        """The conditions that do not depend on captions, for a batch of pictures of a shape in pixels."""
        ...


class Captioned:
    """The items of a corpus: pictures fitted to their shapes, with captions, encoded batch by batch."""

    def __init__(self, corpus: Corpus, encoder: Encoder, buckets: Buckets | None) -> None:
        self.corpus, self.encoder, self.buckets = corpus, encoder, buckets
        self._sizes: dict[int, Shape | Unreadable] = {}

    def __len__(self) -> int:
        return len(self.corpus)

    def name(self, index: int) -> str:
        return self.corpus.name(index)

    def shape(self, index: int, resolution: Shape) -> Shape:
        shapes = bucket_shapes(*resolution, self.encoder.granularity, self.buckets)
        return shapes[0] if len(shapes) == 1 else nearest_shape(self._size(index), shapes)

    def _size(self, index: int) -> Shape:
        if index not in self._sizes:
            try:
                self._sizes[index] = size_of(self.corpus.record(index))
            except Unreadable as reason:
                self._sizes[index] = reason
        size = self._sizes[index]
        if isinstance(size, Unreadable):
            raise size
        return size

    def get(self, index: int, shape: Shape, resolution: Shape, empty: bool) -> tuple[Tensor, str]:
        return prepared(self.corpus.record(index), shape, self.encoder, empty)

    def collate(self, samples: Sequence[tuple[Tensor, str]], shape: Shape) -> Batch:
        return encoded(self.encoder, samples, shape)

    def pixels(self, pictures: Tensor) -> Tensor:
        return self.encoder.decode(pictures)


def encoded(encoder: Encoder, samples: Sequence[tuple[Tensor, str]], shape: Shape) -> Batch:
    """Pictures (3, height, width) of one shape in [-1, 1] with their captions, as a batch."""
    pictures, captions = zip(*samples, strict=True)
    conditions = encoder.encode_captions(captions) | encoder.other_conditions(shape, len(samples))
    return Batch(encoder.encode_images(torch.stack(pictures)).float(), as_floats(conditions), captions)


def prepared(record: Record, shape: Shape, encoder: Encoder, empty: bool = False) -> tuple[Tensor, str]:
    """A record's picture, (3, height, width) in [-1, 1], and its caption.

    Raises:
        Unreadable: the picture cannot be decoded or the caption not encoded.
    """
    try:
        encoder.check(record.caption)
    except ValueError as error:
        raise Unreadable(f"its caption cannot be encoded: {error}") from error
    pixels_HW3 = torch.from_numpy(np.array(fitted(picture_of(record), shape)))
    return pixels_HW3.permute(2, 0, 1).float() / 127.5 - 1, "" if empty else record.caption


def as_floats(conditions: dict[str, Any]) -> dict[str, Any]:
    """Conditions in single precision, whatever the encoder computed in."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in conditions.items()}
