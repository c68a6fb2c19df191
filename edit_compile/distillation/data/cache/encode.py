"""What a cache is made from: captioned pictures, or prompts and the teacher's own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes, nearest_shape
from edit_compile.distillation.data.cache.write import Encoded, by_shape
from edit_compile.distillation.data.captioned import Corpus, Encoder, prepared
from edit_compile.distillation.data.records import Record, Unreadable, size_of
from edit_compile.distillation.data.sources.prompts import Prompts


def _rows(conditions: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    size = len(next(iter(conditions.values())))
    return [{name: x[row].clone() for name, x in conditions.items()} for row in range(size)]


def _caption_rows(encoder: Encoder, captions: Sequence[str], batch: int) -> list[dict[str, Tensor]]:
    chunks = (captions[start : start + batch] for start in range(0, len(captions), batch))
    return [row for chunk in chunks for row in _rows(encoder.encode_captions(chunk))]


def records_of(corpus: Corpus, start: int) -> Iterator[tuple[str, Record | Unreadable]]:
    """The records of a corpus from an index on, by name, or why there is none."""
    for index in range(start, len(corpus)):
        try:
            yield corpus.name(index), corpus.record(index)
        except Unreadable as reason:
            yield corpus.name(index), reason


@dataclass
class PictureProducer:
    """Captioned pictures, encoded. `batch`: how many at a time."""

    records: Callable[[int], Iterator[tuple[str, Record | Unreadable]]]
    encoder: Encoder
    buckets: Buckets | None
    batch: int
    unreadable: dict[str, str] = field(default_factory=dict)

    def encode(
        self, records: Sequence[tuple[str, Record | Unreadable]], resolutions: Sequence[Shape]
    ) -> tuple[list[Encoded], dict[str, str]]:
        skipped: dict[str, str] = {}
        ready: list[tuple[str, str, dict[Shape, tuple[Shape, Tensor]]]] = []
        for name, record in records:
            try:
                if isinstance(record, Unreadable):
                    raise record
                ready.append((name, record.caption, self._pictures(record, resolutions)))
            except Unreadable as reason:
                skipped[name] = str(reason)
        for resolution in resolutions:
            self._to_latents(resolution, [pictures for _, _, pictures in ready])
        captions = _caption_rows(self.encoder, [caption for _, caption, _ in ready], self.batch)
        return [Encoded(name, text, own, pictures) for (name, text, pictures), own in zip(ready, captions, strict=True)], skipped

    def empty(self) -> dict[str, Tensor]:
        return self.encoder.encode_captions([""])

    def _pictures(self, record: Record, resolutions: Sequence[Shape]) -> dict[Shape, tuple[Shape, Tensor]]:
        found, size = {}, size_of(record)
        for resolution in resolutions:
            shape = nearest_shape(size, bucket_shapes(*resolution, self.encoder.granularity, self.buckets))
            found[resolution] = shape, prepared(record, shape, self.encoder)[0]
        return found

    def _to_latents(self, resolution: Shape, pictures: Sequence[dict[Shape, tuple[Shape, Tensor]]]) -> None:
        """Replace the pictures of a resolution by their latents."""
        for shape, numbers in by_shape([own[resolution][0] for own in pictures], self.batch):
            latents = self.encoder.encode_images(torch.stack([pictures[number][resolution][1] for number in numbers]))
            for number, own in zip(numbers, latents, strict=True):
                pictures[number][resolution] = shape, own.clone()


@dataclass
class PromptProducer:
    """Prompts and the teacher's samples. `batch`: how many are drawn at a time."""

    prompts: Prompts
    batch: int
    unreadable: dict[str, str] = field(default_factory=dict)

    def records(self, start: int) -> Iterator[int]:
        return iter(range(start, len(self.prompts)))

    def encode(self, records: Sequence[int], resolutions: Sequence[Shape]) -> tuple[list[Encoded], dict[str, str]]:
        skipped, ready = {}, []
        for index in records:
            try:
                ready.append(self.prompts.get(index, (0, 0), (0, 0), empty=False)[0])
            except Unreadable as reason:
                skipped[self.prompts.name(index)] = str(reason)
        pictures: list[dict[Shape, tuple[Shape, Any]]] = [{} for _ in ready]
        for resolution in resolutions:
            for shape, numbers in by_shape([self.prompts.shape(index, resolution) for index in ready], self.batch):
                for number, own in zip(numbers, self.prompts.drawn([ready[number] for number in numbers], shape), strict=True):
                    pictures[number][resolution] = shape, own.clone()
        texts = [self.prompts.caption(index) for index in ready]
        captions = _caption_rows(self.prompts.encoder, texts, self.batch)
        names = [self.prompts.name(index) for index in ready]
        return [Encoded(*sample) for sample in zip(names, texts, captions, pictures, strict=True)], skipped

    def empty(self) -> dict[str, Tensor]:
        return self.prompts.encoder.encode_captions([""])
