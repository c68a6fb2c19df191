"""A source over a stream: records are read in order, a window of batches at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

from torch import Tensor

from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes, nearest_shape
from edit_compile.distillation.data.captioned import Encoder, encoded, prepared
from edit_compile.distillation.data.records import Record, Unreadable, note, size_of, some_of
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import Batch, Request
from edit_compile.distillation.data.sources.hub import Found, Stream
from edit_compile.errors import DistillError

_WINDOW = 16  # batches
Sized = tuple[Record, Shape]


class Streamed:
    """Batches from a stream.

    The records of a window of batches are sorted by their pictures' ratios, and each batch takes the bucket that its median
    ratio is nearest to: so all records are used, none waits for others of its ratio, and a batch depends on its window alone.
    A window before the one at hand is reached by reading the stream again.
    """

    concurrent = True

    def __init__(self, stream: Stream, encoder: Encoder, buckets: Buckets | None, seed: int, caption_dropout: float) -> None:
        self.stream, self.encoder, self.buckets, self.seed, self.caption_dropout = stream, encoder, buckets, seed, caption_dropout
        self.skipped: dict[str, str] = {}
        self._reader, self._read = self._endless(), 0
        self._window: tuple[tuple[int, int], list[list[Sized]]] | None = None
        self._held_out: list[Sized] | None = None

    def check(self, height: int, width: int) -> None:
        bucket_shapes(height, width, self.encoder.granularity, self.buckets)

    def batch(self, request: Request) -> Batch:
        if request.split == "held-out":
            chosen, others = self._held_out_records(request.rows)
        else:
            window, which = divmod(request.position // request.size, _WINDOW)
            batches = self._batches(window, request.size)
            chosen = [batches[which][row] for row in request.rows]
            others = [record for batch in (*batches[which:], *batches[:which]) for record in batch]
        shapes = bucket_shapes(request.height, request.width, self.encoder.granularity, self.buckets)
        whole = chosen if request.split == "held-out" else batches[which]
        shape = nearest_shape(sorted((size for _, size in whole), key=_ratio)[len(whole) // 2], shapes)
        samples = [
            self._first([record, *others], shape, self._is_empty(request, position))
            for record, position in zip(chosen, request.positions, strict=True)
        ]
        return encoded(self.encoder, samples, shape)

    def pixels(self, pictures: Tensor) -> Tensor | None:
        return self.encoder.decode(pictures)

    def _first(self, candidates: Sequence[Sized], shape: Shape, empty: bool) -> tuple[Tensor, str]:
        """The first that can be read."""
        for record, _ in candidates:
            try:
                return prepared(record, shape, self.encoder, empty)
            except Unreadable as reason:
                note(self.skipped, record.name, reason)
        raise self._nothing_left()

    def _is_empty(self, request: Request, position: int) -> bool:
        return request.split == "train" and seed_of(self.seed, "empty", position) / 2**56 < self.caption_dropout

    def _batches(self, window: int, size: int) -> list[list[Sized]]:
        if self._window is None or self._window[0] != (window, size):
            start = window * _WINDOW * size
            if start < self._read:
                self._reader, self._read = self._endless(), 0
            records = list(islice(self._reader, start - self._read, start - self._read + _WINDOW * size))
            self._read = start + len(records)
            mixer = random.Random(f"{self.seed}/window/{window}")
            mixer.shuffle(records)
            records.sort(key=lambda record: _ratio(record[1]))
            batches = [records[i : i + size] for i in range(0, len(records), size)]
            mixer.shuffle(batches)
            self._window = (window, size), batches
        return self._window[1]

    def _held_out_records(self, rows: range) -> tuple[list[Sized], list[Sized]]:
        if self._held_out is None:
            self._held_out = sorted(self._sized(self.stream.held_out()), key=lambda record: _ratio(record[1]))
            if not self._held_out:
                raise self._nothing_left()
        records = self._held_out
        return [records[row % len(records)] for row in rows], records

    def _endless(self) -> Iterator[Sized]:
        for number in count():
            empty = True
            for record in self._sized(self.stream.epoch(number)):
                empty = False
                yield record
            if empty:
                raise self._nothing_left()

    def _sized(self, found: Iterator[Found]) -> Iterator[Sized]:
        for name, record in found:
            try:
                if isinstance(record, Unreadable):
                    raise record
                yield record, size_of(record)
            except Unreadable as reason:
                note(self.skipped, name, reason)

    def _nothing_left(self) -> DistillError:
        return DistillError(f"the stream has nothing that can be read besides what data.held_out keeps back; {some_of(self.skipped)}")


def _ratio(size: Shape) -> float:
    return math.log(size[0] / size[1])
