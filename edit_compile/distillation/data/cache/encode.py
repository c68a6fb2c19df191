"""What encodes captioned images for a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes, nearest_shape
from edit_compile.distillation.data.cache.write import Encoded
from edit_compile.distillation.data.decode_image import size_of
from edit_compile.distillation.data.encoding import Encoder, prepare
from edit_compile.distillation.data.records import BadSample, NamedRecord, Record, RecordDataset
from edit_compile.progress import each


def encode_captions(encoder: Encoder, captions: Sequence[str], batch_size: int) -> list[dict[str, Tensor]]:
    """Encode captions, `batch_size` at a time, to conditions of one caption each, without a batch dimension."""
    chunks = (captions[start : start + batch_size] for start in range(0, len(captions), batch_size))
    return [row for chunk in chunks for row in _rows(encoder.encode_captions(chunk), len(chunk))]


def _rows(conditions: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    return [{name: x[row].clone() for name, x in conditions.items()} for row in range(size)]


def records_from(dataset: RecordDataset, start: int) -> Iterator[NamedRecord]:
    """Yield the records from an index on, by name, or why they cannot be read."""
    for index in range(start, len(dataset)):
        try:
            yield dataset.name(index), dataset.record(index)
        except BadSample as reason:
            yield dataset.name(index), reason


def by_shape(shapes: Sequence[Shape], batch_size: int) -> Iterator[tuple[Shape, list[int]]]:
    """Group the indices of equal shapes, at most `batch_size` at a time."""
    for shape in sorted(set(shapes)):
        numbers = [number for number, own in enumerate(shapes) if own == shape]
        yield from ((shape, numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size))


@dataclass
class ImageProducer:
    """Captioned images, encoded `batch_size` at a time.

    Attributes:
        records: yields the records from a number on.
        fingerprint: of the records, as of `RecordDataset`.
        skipped: what could not be read before any record was asked for, by name, with the reason.
        random_access: whether `records` may begin anywhere at no cost.
        number: of records; None if that is not known.
    """

    records: Callable[[int], Iterator[NamedRecord]]
    encoder: Encoder
    buckets: Buckets | None
    batch_size: int
    fingerprint: Callable[[], str]
    skipped: dict[str, str] = field(default_factory=dict)
    random_access: bool = True
    number: int | None = None

    def encode(self, records: Sequence[NamedRecord], resolutions: Sequence[Shape]) -> tuple[list[Encoded], dict[str, str]]:
        skipped: dict[str, str] = {}
        ready: list[tuple[str, tuple[str, ...], dict[Shape, tuple[Shape, Tensor]]]] = []
        for name, record in each(records, "reading images", len(records)):
            try:
                if isinstance(record, BadSample):
                    raise record
                ready.append((name, record.captions, self._images(record, resolutions)))
            except BadSample as reason:
                skipped[name] = str(reason)
        for resolution in resolutions:
            self._to_latents(resolution, [images for _, _, images in ready])
        encoded = iter(encode_captions(self.encoder, [text for _, texts, _ in ready for text in texts], self.batch_size))
        return [Encoded(name, tuple((text, next(encoded)) for text in texts), latents) for name, texts, latents in ready], skipped

    def empty_caption(self) -> dict[str, Tensor]:
        return self.encoder.encode_captions([""])

    def _images(self, record: Record, resolutions: Sequence[Shape]) -> dict[Shape, tuple[Shape, Tensor]]:
        found, size = {}, size_of(record)
        for resolution in resolutions:
            shape = nearest_shape(size, bucket_shapes(*resolution, self.encoder.granularity, self.buckets))
            found[resolution] = shape, prepare(record, shape, self.encoder, 0)[0]
        return found

    def _to_latents(self, resolution: Shape, images: Sequence[dict[Shape, tuple[Shape, Tensor]]]) -> None:
        """Replace the images of a resolution with their latents."""
        for shape, numbers in by_shape([own[resolution][0] for own in images], self.batch_size):
            latents = self.encoder.encode_images(torch.stack([images[number][resolution][1] for number in numbers]))
            for number, own in zip(numbers, latents, strict=True):
                images[number][resolution] = shape, own.clone()
