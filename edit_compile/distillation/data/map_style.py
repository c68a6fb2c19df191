"""Sources of random access: samples by index, shuffled, held out, and replaced where they cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from edit_compile.distillation.data.bucket_order import Order
from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.records import Unreadable, note, some_of
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import Batch, Request, Split
from edit_compile.errors import DistillError

_THREADS = 8
_HELD_OUT_SHARE, _HELD_OUT_LEAST, _HELD_OUT_MOST = 50, 8, 256


class Items(Protocol):
    """Samples by index. `shape` and `get` raise Unreadable for those that cannot be used."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def shape(self, index: int, resolution: Shape) -> Shape:
        """The shape in pixels that a sample has at a stage's resolution.

        Raises:
            DistillError: samples of this resolution cannot be had.
        """
        ...

    def get(self, index: int, shape: Shape, resolution: Shape, empty: bool) -> Any:
        """A sample, with the empty caption instead of its own if asked for."""
        ...

    def collate(self, samples: Sequence[Any], shape: Shape) -> Batch: ...

    def pixels(self, pictures: Tensor) -> Tensor | None: ...


@dataclass
class Indexed:
    """A source over items.

    Attributes:
        held_out: how many samples, spread evenly over the items, are never trained on. Default: a fiftieth of
            them, 8 to 256, and of few a quarter.
        caption_dropout: the share of training samples whose caption is empty.
        concurrent: as of `Source`.
    """

    items: Items
    seed: int
    held_out: int | None = None
    caption_dropout: float = 0.0
    concurrent: bool = True
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._orders: dict[tuple[Shape, Split], tuple[list[Shape], Order]] = {}
        total = len(self.items)
        count = self.held_out or min(max(total // _HELD_OUT_SHARE, min(_HELD_OUT_LEAST, total // 4), 1), _HELD_OUT_MOST)
        if count >= total:
            raise DistillError(f"data.held_out: {count} of {total} samples are to be held out: none is left to train on")
        self._kept_back = {(2 * number + 1) * total // (2 * count) for number in range(count)}

    def check(self, height: int, width: int) -> None:
        found = (self._shape(index, (height, width)) for index in range(len(self.items)))
        if all(isinstance(shape, Unreadable) for shape in found):  # ends at the first that can be had
            raise self._nothing_left("train")

    def batch(self, request: Request) -> Batch:
        """The requested rows; of held-out samples the rows are a batch of their own, so that a measurement sees many shapes."""
        size, rows, position = request.size, request.rows, request.position
        if request.split == "held-out":
            size, rows, position = len(rows), range(len(rows)), rows.start
        resolution = (request.height, request.width)
        shapes, order = self._order(resolution, request.split)
        first, start = order.batch(position // size, size)
        for further in range(len(shapes)):
            group = (first + further) % len(shapes)
            found = self._samples(order, group, [start + row for row in rows], shapes[group], resolution, request)
            if found is not None:
                return self.items.collate(found, shapes[group])
        raise self._nothing_left(request.split)

    def pixels(self, pictures: Tensor) -> Tensor | None:
        return self.items.pixels(pictures)

    def _order(self, resolution: Shape, split: Split) -> tuple[list[Shape], Order]:
        if (resolution, split) not in self._orders:
            groups: dict[Shape, list[int]] = {}
            own = [index for index in range(len(self.items)) if (index in self._kept_back) == (split == "held-out")]
            with ThreadPoolExecutor(_THREADS, "edit_compile-shapes") as pool:  # it may be files that have to be opened
                found = list(pool.map(lambda index: self._shape(index, resolution), own))
            for index, shape in zip(own, found, strict=True):
                if isinstance(shape, Unreadable):
                    note(self.skipped, self.items.name(index), shape)
                else:
                    groups.setdefault(shape, []).append(index)
            if not groups:
                raise self._nothing_left(split)
            shapes = sorted(groups)
            self._orders[resolution, split] = shapes, Order([groups[shape] for shape in shapes], self.seed)
        return self._orders[resolution, split]

    def _shape(self, index: int, resolution: Shape) -> Shape | Unreadable:
        try:
            return self.items.shape(index, resolution)
        except Unreadable as reason:
            return reason

    def _samples(self, order: Order, group: int, places: list[int], shape: Shape, resolution: Shape, request: Request) -> list[Any] | None:
        """A sample for each place, or None if none of the group can be read."""

        def one(place: int, position: int) -> Any:
            for index in order.candidates(group, place):
                try:
                    return self.items.get(index, shape, resolution, self._is_empty(request.split, position))
                except Unreadable as reason:
                    note(self.skipped, self.items.name(index), reason)
            return None

        with ThreadPoolExecutor(min(_THREADS, len(places)), "edit_compile-read") as pool:
            found = list(pool.map(one, places, request.positions))
        return None if any(sample is None for sample in found) else found

    def _is_empty(self, split: Split, position: int) -> bool:
        return split == "train" and seed_of(self.seed, "empty", position) / 2**56 < self.caption_dropout

    def _nothing_left(self, split: Split) -> DistillError:
        part = "" if split == "train" else "that are held out (data.held_out says how many) "
        return DistillError(f"of {len(self.items)} samples none {part}can be read: {some_of(self.skipped)}")
