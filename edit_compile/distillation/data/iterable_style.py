"""Sources over a stream: records are read in order, a window of batches at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Protocol

from torch import Tensor

from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes, nearest_shape
from edit_compile.distillation.data.decode_image import size_of
from edit_compile.distillation.data.encoding import Encoder, encode, prepare
from edit_compile.distillation.data.records import BadSample, NamedRecord, Record, log_skip, summarize
from edit_compile.distillation.data.seeding import caption_draw
from edit_compile.distillation.data.source import Batch, BatchRequest
from edit_compile.errors import DistillError

_WINDOW = 16  # batches
Sized = tuple[Record, Shape]


class RecordStream(Protocol):
    """Records that can only be read in order."""

    def held_out(self) -> Iterator[NamedRecord]:
        """Yield those that are never trained on."""
        ...

    def epoch(self, number: int) -> Iterator[NamedRecord]:
        """Yield all others, in an order that may differ by epoch."""
        ...

    def fingerprint(self) -> str:
        """Return what changes when the data change, as far as can be known without reading them."""
        ...


class IterableSource:
    """A source over a stream.

    The records of a window of batches are sorted by the aspect ratios of their images, and each batch takes the bucket nearest
    to its median ratio. So all records are used, none waits for others of its ratio, and a batch depends on its window alone.
    An earlier window is reached by reading the stream again.

    Args:
        processes: into how many parts the records are split where each process's stream has records of its own; 1 where the streams
            of all have the same.
    """

    concurrent = True

    def __init__(
        self, stream: RecordStream, encoder: Encoder, buckets: Buckets | None, seed: int, caption_dropout: float, processes: int = 1
    ) -> None:
        self.processes = processes
        self.stream, self.encoder, self.buckets, self.seed, self.caption_dropout = stream, encoder, buckets, seed, caption_dropout
        self.skipped: dict[str, str] = {}
        self._reader, self._read = self._endless(), 0
        self._window: tuple[tuple[int, int], list[list[Sized]]] | None = None
        self._held_out: list[Sized] | None = None

    def check(self, height: int, width: int, frames: int | None = None) -> None:
        bucket_shapes(height, width, self.encoder.granularity, self.buckets)

    def batch(self, request: BatchRequest) -> Batch:
        return self._validation_batch(request) if request.split == "validation" else self._training_batch(request)

    def decode(self, latents: Tensor) -> Tensor | None:
        return self.encoder.decode(latents)

    def fingerprint(self) -> str:
        return self.stream.fingerprint()

    def _training_batch(self, request: BatchRequest) -> Batch:
        window, number = divmod(request.position // request.size, _WINDOW)
        batches, count = self._batches(window, request.size // self.processes), len(request.rows)
        fallbacks = [record for batch in (*batches[number:], *batches[:number]) for record in batch]
        first = request.rows.start // (count * self.processes) * count if self.processes > 1 else request.rows.start
        return self._encoded(request, batches[number], batches[number][first : first + count], fallbacks)

    def _validation_batch(self, request: BatchRequest) -> Batch:
        if self._held_out is None:
            self._held_out = sorted(self._sized(self.stream.held_out()), key=lambda record: _ratio(record[1]))
            if not self._held_out:
                raise self._nothing_left()
        records = self._held_out
        chosen = [records[row % len(records)] for row in request.rows]
        return self._encoded(request, chosen, chosen, records)

    def _encoded(self, request: BatchRequest, batch: Sequence[Sized], chosen: Sequence[Sized], fallbacks: Sequence[Sized]) -> Batch:
        """Encode the chosen records in the shape of their batch; those that cannot be read are replaced."""
        shapes = bucket_shapes(request.height, request.width, self.encoder.granularity, self.buckets)
        shape = nearest_shape(sorted((size for _, size in batch), key=_ratio)[len(batch) // 2], shapes)
        samples = []
        for record, position in zip(chosen, request.positions, strict=True):
            draw = None if request.empty_captions else caption_draw(self.caption_dropout, self.seed, request.split, position)
            samples.append(self._first_readable([record, *fallbacks], shape, draw))
        return encode(self.encoder, samples, shape)

    def _first_readable(self, records: Sequence[Sized], shape: Shape, draw: int | None) -> tuple[Tensor, str]:
        for record, _ in records:
            try:
                return prepare(record, shape, self.encoder, draw)
            except BadSample as reason:
                log_skip(self.skipped, record.name, reason)
        raise self._nothing_left()

    def _batches(self, window: int, size: int) -> list[list[Sized]]:
        if self._window is None or self._window[0] != (window, size):
            start = window * _WINDOW * size
            if start < self._read:
                self._reader, self._read = self._endless(), 0
            records = list(islice(self._reader, start - self._read, start - self._read + _WINDOW * size))
            self._read = start + len(records)
            shuffler = random.Random(f"{self.seed}/window/{window}")
            shuffler.shuffle(records)
            records.sort(key=lambda record: _ratio(record[1]))
            batches = [records[i : i + size] for i in range(0, len(records), size)]
            shuffler.shuffle(batches)
            self._window = (window, size), batches
        return self._window[1]

    def _endless(self) -> Iterator[Sized]:
        for number in count():
            empty = True
            for record in self._sized(self.stream.epoch(number)):
                empty = False
                yield record
            if empty:
                raise self._nothing_left()

    def _sized(self, records: Iterator[NamedRecord]) -> Iterator[Sized]:
        for name, record in records:
            try:
                if isinstance(record, BadSample):
                    raise record
                yield record, size_of(record)
            except BadSample as reason:
                log_skip(self.skipped, name, reason)

    def _nothing_left(self) -> DistillError:
        return DistillError(f"the stream has nothing readable besides the held-out samples (data.held_out); {summarize(self.skipped)}")


def _ratio(size: Shape) -> float:
    return math.log(size[0] / size[1])
