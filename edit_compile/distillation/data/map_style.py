"""Sources with random access: samples by index, shuffled, held out, and replaced where they cannot be read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from edit_compile.distillation.data.bucket_batches import BucketBatchSampler
from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.records import BadSample, log_skip, summarize
from edit_compile.distillation.data.seeding import caption_draw
from edit_compile.distillation.data.source import Batch, BatchRequest, DataSummary, Split
from edit_compile.errors import DistillError

_THREADS = 8
_HELD_OUT_SHARE, _HELD_OUT_LEAST, _HELD_OUT_MOST = 50, 8, 256


class SampleDataset(Protocol):
    """Samples by index. `shape` and `get` raise BadSample for those that cannot be used."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def shape(self, index: int, resolution: Shape) -> Shape:
        """Return the shape in pixels that a sample has at a stage's resolution.

        Raises:
            DistillError: there are no samples of this resolution.
        """
        ...

    def get(self, index: int, shape: Shape, resolution: Shape, draw: int | None) -> Any:
        """Read a sample, with the caption that `caption_draw` has drawn."""
        ...

    def collate(self, samples: Sequence[Any], shape: Shape) -> Batch: ...

    def decode(self, latents: Tensor) -> Tensor | None: ...

    def fingerprint(self) -> str:
        """Return what changes when samples are added, removed or renamed, or their files change in size."""
        ...


@dataclass
class MapStyleSource:
    """A source over a dataset with random access.

    Attributes:
        held_out: how many samples, spread evenly over the dataset, are never trained on. Default: a fiftieth of
            them, 8 to 256, and of a small dataset a quarter.
        caption_dropout: the share of training samples that get the empty caption.
        concurrent: as of `DataSource`.
    """

    dataset: SampleDataset
    seed: int
    held_out: int | None = None
    caption_dropout: float = 0.0
    concurrent: bool = True
    skipped: dict[str, str] = field(default_factory=dict)
    _samplers: dict[tuple[Shape, Split], tuple[list[Shape], BucketBatchSampler]] = field(default_factory=dict, init=False, repr=False)
    _held_out_indices: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        total = len(self.dataset)
        count = self.held_out or min(max(total // _HELD_OUT_SHARE, min(_HELD_OUT_LEAST, total // 4), 1), _HELD_OUT_MOST)
        if count >= total:
            raise DistillError(f"data.held_out: {count} of {total} samples would be held out, leaving none to train on")
        self._held_out_indices = {(2 * number + 1) * total // (2 * count) for number in range(count)}

    def check(self, height: int, width: int, frames: int | None = None) -> None:
        found = (self._shape(index, (height, width)) for index in range(len(self.dataset)))
        if all(isinstance(shape, BadSample) for shape in found):  # ends at the first that is readable
            raise self._nothing_left("train")

    def batch(self, request: BatchRequest) -> Batch:
        """Return the requested rows. Validation rows are a batch of their own, so that a measurement sees many shapes."""
        size, rows, position = request.size, request.rows, request.position
        if request.split == "validation":
            size, rows, position = len(rows), range(len(rows)), rows.start
        resolution = (request.height, request.width)
        shapes, sampler = self._sampler(resolution, request.split)
        first, start = sampler.batch(position // size, size)
        for further in range(len(shapes)):
            group = (first + further) % len(shapes)
            samples = self._samples(sampler, group, [start + row for row in rows], shapes[group], request)
            if samples is not None:
                return self.dataset.collate(samples, shapes[group])
        raise self._nothing_left(request.split)

    def decode(self, latents: Tensor) -> Tensor | None:
        return self.dataset.decode(latents)

    def summary(self, height: int, width: int) -> DataSummary:
        shapes, sampler = self._sampler((height, width), "train")
        held_out = sum(map(len, self._sampler((height, width), "validation")[1].groups))
        counts = dict(zip(shapes, map(len, sampler.groups), strict=True))
        return DataSummary(len(self.dataset), held_out, len(self.skipped), counts)

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def held_out_names(self) -> list[str]:
        return [self.dataset.name(index) for index in sorted(self._held_out_indices)]

    def hold_out(self, names: Collection[str]) -> None:
        wanted = frozenset(names)
        found = {index for index in range(len(self.dataset)) if self.dataset.name(index) in wanted}
        if not found or len(found) == len(self.dataset):
            raise DistillError(f"{len(found)} of {len(self.dataset)} samples are those that were held out: the data are others now")
        self._held_out_indices = found
        self._samplers.clear()

    def _sampler(self, resolution: Shape, split: Split) -> tuple[list[Shape], BucketBatchSampler]:
        """Return the shapes of a split's samples, and the sampler over the groups of each shape."""
        if (resolution, split) not in self._samplers:
            groups: dict[Shape, list[int]] = {}
            own = [index for index in range(len(self.dataset)) if (index in self._held_out_indices) == (split == "validation")]
            with ThreadPoolExecutor(_THREADS, "edit_compile-shapes") as pool:  # it may be files that have to be opened
                found = list(pool.map(lambda index: self._shape(index, resolution), own))
            for index, shape in zip(own, found, strict=True):
                if isinstance(shape, BadSample):
                    log_skip(self.skipped, self.dataset.name(index), shape)
                else:
                    groups.setdefault(shape, []).append(index)
            if not groups:
                raise self._nothing_left(split)
            shapes = sorted(groups)
            self._samplers[resolution, split] = shapes, BucketBatchSampler([groups[shape] for shape in shapes], self.seed)
        return self._samplers[resolution, split]

    def _shape(self, index: int, resolution: Shape) -> Shape | BadSample:
        try:
            return self.dataset.shape(index, resolution)
        except BadSample as reason:
            return reason

    def _samples(self, sampler: BucketBatchSampler, group: int, places: list[int], shape: Shape, request: BatchRequest) -> list[Any] | None:
        """Read a sample for each place, or return None if none of the group can be read."""
        resolution = (request.height, request.width)

        def one(place: int, position: int) -> Any:
            draw = None if request.empty_captions else caption_draw(self.caption_dropout, self.seed, request.split, position)
            for index in sampler.fallbacks(group, place):
                try:
                    return self.dataset.get(index, shape, resolution, draw)
                except BadSample as reason:
                    log_skip(self.skipped, self.dataset.name(index), reason)
            return None

        with ThreadPoolExecutor(min(_THREADS, len(places)), "edit_compile-read") as pool:
            samples = list(pool.map(one, places, request.positions))
        return None if any(sample is None for sample in samples) else samples

    def _nothing_left(self, split: Split) -> DistillError:
        which = len(self.dataset) if split == "train" else f"{len(self._held_out_indices)} held-out"
        return DistillError(f"none of the {which} samples could be read: {summarize(self.skipped)}")
