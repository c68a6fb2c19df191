"""From captioned images to what a transformer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from edit_compile.adapters.encoders import make_encoder
from edit_compile.distillation.data.buckets import Shape, fitted
from edit_compile.distillation.data.decode_image import image_of
from edit_compile.distillation.data.records import BadSample, Record
from edit_compile.distillation.data.source import Batch, SourceContext


class Encoder(Protocol):
    """Encodes captions and images for a transformer.

    Attributes:
        granularity: the sides of images must be multiples of it, in pixels.
    """

    granularity: int

    def check(self, caption: str) -> None:
        """Raise ValueError for a caption that cannot be encoded."""
        ...

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode B captions to conditions, tensors (B, ...) on the CPU."""
        ...

    def encode_images(self, images_B3HW: Tensor, /) -> Tensor:
        """Encode images in [-1, 1] to latents (B, C, h, w) on the CPU, in the model's scale."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images in [0, 1], (B, 3, height, width), on the CPU."""
        ...

    def other_conditions(self, size: Shape, batch: int) -> dict[str, Any]:
        """Return the conditions that do not depend on captions, for a batch of images of a size in pixels."""
        ...


def encoder_for(context: SourceContext, text_tokens: int | None) -> Encoder:
    """Load the encoder of a run's model.

    Args:
        text_tokens: the longest caption in tokens of the pipeline's longest encoder; None for the pipeline's own.

    Raises:
        DistillError: there is none.
    """
    return make_encoder(context.model, context.base, context.device, context.dtype, text_tokens)


def prepare(record: Record, shape: Shape, encoder: Encoder, draw: int | None) -> tuple[Tensor, str]:
    """Decode and fit a record's image, (3, height, width) in [-1, 1], and give the caption that `caption_draw` has drawn.

    Raises:
        BadSample: the image cannot be decoded, or a caption cannot be encoded.
    """
    try:
        for caption in record.captions:
            encoder.check(caption)
    except ValueError as error:
        raise BadSample(f"its caption cannot be encoded: {error}") from error
    pixels_HW3 = torch.from_numpy(np.array(fitted(image_of(record), shape)))
    return pixels_HW3.permute(2, 0, 1).float() / 127.5 - 1, "" if draw is None else record.captions[draw % len(record.captions)]


def encode(encoder: Encoder, samples: Sequence[tuple[Tensor, str]], shape: Shape) -> Batch:
    """Encode images (3, height, width) of one shape in [-1, 1], with their captions, as a batch."""
    images, captions = zip(*samples, strict=True)
    conditions = encoder.encode_captions(captions) | encoder.other_conditions(shape, len(samples))
    return Batch(encoder.encode_images(torch.stack(images)).float(), as_floats(conditions), captions)


def as_floats(conditions: dict[str, Any]) -> dict[str, Any]:
    """Convert conditions to single precision, whatever the encoder computed in."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in conditions.items()}
