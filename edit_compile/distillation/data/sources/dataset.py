"""Data of kind `dataset`: whatever `datasets` loads, from the hub or from files, with random access or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator
from torch import nn

from edit_compile.distillation.data.cache.encode import ImageProducer, records_from
from edit_compile.distillation.data.cache.write import Producer
from edit_compile.distillation.data.captioned_images import CaptionedImages
from edit_compile.distillation.data.encoding import encoder_for
from edit_compile.distillation.data.iterable_style import IterableSource
from edit_compile.distillation.data.records import CAPTION_KEYS, BadSample, NamedRecord, Record, captions_in, check_usable, fingerprint_of
from edit_compile.distillation.data.registry import register_data
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import DataSource, SourceContext
from edit_compile.distillation.processes import process
from edit_compile.errors import DistillError
from edit_compile.extras import need

_IMAGE_KEYS = ("image", "picture", "jpg", "jpeg", "png", "webp")
_HELD_OUT_SHARDS, _STREAM_HELD_OUT = 8, 256


@register_data("dataset")
class DatasetData(CaptionedImages):
    """A dataset of the hub, or any that `datasets.load_dataset` reads."""

    kind: Literal["dataset"]
    path: str
    """As `load_dataset` takes it: a hub id, a folder, or a format (`imagefolder`, `webdataset`, `parquet`, ...)."""
    name: str | None = None
    """The dataset's configuration."""
    split: str = "train"
    """The dataset's split."""
    revision: str | None = None
    """A commit or branch on the hub."""
    data_dir: str | None = None
    """The folder of the data, within the dataset or of a format."""
    data_files: str | list[str] | None = None
    """Files or globs, within the dataset or of a format."""
    image: str | None = None
    """The column of the images. Default: the usual names."""
    caption: str | None = None
    """The column of the captions. Default: the usual names."""
    streaming: bool = False
    """Read the data as it is downloaded, and keep nothing. A stage continues where the one before ended by reading up to there."""
    own_shards: bool = False
    """Of a stream, let each process read shards of its own, and no others but for what is held out. What a run is trained on then depends
    on how many processes it has. Default: all processes read all of it, and together see what one would see."""

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.own_shards and not self.streaming:
            raise ValueError("own_shards: only streams are split by shards, set streaming: true")
        return self

    def load(self) -> Any:
        """Load the dataset, its images not decoded.

        Raises:
            DistillError: it cannot be loaded.
        """
        need("distill", "data.kind dataset", "datasets")
        import datasets

        options = self.model_dump(include={"name", "split", "revision", "data_dir", "data_files", "streaming"}, exclude_none=True)
        try:
            found = datasets.load_dataset(self.path, **options)
        except Exception as error:  # each format raises errors of its own
            raise DistillError(f"data.path: {self.path} cannot be loaded: {error or type(error).__name__}") from error
        if self.streaming:
            return found.decode(False)
        for column, feature in found.features.items():
            if isinstance(feature, datasets.Image):
                found = found.cast_column(column, datasets.Image(decode=False))
        return found

    def check_files(self, model: nn.Module) -> None:
        """Load the dataset, and find an image with a caption, unless it is a stream."""
        if self.streaming:
            self.load()
        else:
            check_usable(records_from(self.records({}), 0), self.path, {})

    def records(self, skipped: dict[str, str]) -> HubDataset:
        """Open the rows."""
        return HubDataset(self)

    def open(self, context: SourceContext) -> DataSource:
        """Open a source with random access, or over a stream."""
        if not self.streaming:
            return super().open(context)
        part = process() if self.own_shards else (0, 1)
        stream = HubStream(self, context.seed, self.held_out or _STREAM_HELD_OUT, part)
        encoder = encoder_for(context, self.text_tokens)
        return IterableSource(stream, encoder, self.buckets, context.seed, self.caption_dropout, part[1])

    def producer(self, context: SourceContext, batch_size: int) -> Producer:
        """Return what encodes the rows for a cache."""
        if not self.streaming:
            return super().producer(context, batch_size)
        stream = HubStream(self, context.seed, 0)
        encoder = encoder_for(context, self.text_tokens)
        return ImageProducer(stream.records, encoder, self.buckets, batch_size, stream.fingerprint, random_access=False)


class HubDataset:
    """The rows of a dataset."""

    def __init__(self, data: DatasetData) -> None:
        self.data, self.rows = data, data.load()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.data.path}, row {index}"

    def record(self, index: int) -> Record:
        """Return a row's record.

        Raises:
            BadSample: it lacks an image or a caption.
        """
        try:
            row = self.rows[index]
        except Exception as error:  # damaged files raise what their format raises
            raise BadSample(f"it cannot be read: {error}") from error
        return record_of(row, self.name(index), self.data)

    def fingerprint(self) -> str:
        files = [Path(file["filename"]).parts[-3:] for file in self.rows.cache_files]  # `datasets` names them by its own fingerprint
        return fingerprint_of([len(self.rows), self.rows.features, self.rows.dataset_size, files])


class HubStream:
    """A dataset read shard by shard. Where the rest of a shard cannot be read, that is reported, and the next shard begins.

    The first records of the first shards are the held-out ones.
    """

    def __init__(self, data: DatasetData, seed: int, held_out: int, part: tuple[int, int] = (0, 1)) -> None:
        """
        Args:
            part: which part of each epoch's shards is read, and of how many.

        Raises:
            DistillError: there are fewer shards than parts.
        """
        self.data, self.seed, self.part, self.rows = data, seed, part, data.load()
        self.shards = self.rows.num_shards
        if self.shards < part[1]:
            raise DistillError(
                f"data.own_shards: {data.path} has {self.shards} {'shards' if self.shards > 1 else 'shard'} for {part[1]} processes: "
                "leave it out, or start fewer"
            )
        self.held_out_per_shard = -(-held_out // min(self.shards, _HELD_OUT_SHARDS))

    def held_out(self) -> Iterator[NamedRecord]:
        """Yield those that are never trained on."""
        for shard in range(min(self.shards, _HELD_OUT_SHARDS)):
            yield from islice(self._shard(shard), self.held_out_per_shard)

    def epoch(self, number: int) -> Iterator[NamedRecord]:
        """Yield all others of this part's shards, which are shuffled."""
        rank, parts = self.part
        for shard in np.random.default_rng(seed_of(self.seed, "shards", number)).permutation(self.shards)[rank::parts]:
            yield from islice(self._shard(int(shard)), self.held_out_per_shard if shard < _HELD_OUT_SHARDS else 0, None)

    def records(self, start: int) -> Iterator[NamedRecord]:
        """Yield all in order, from the one of number `start` on."""
        return islice((found for shard in range(self.shards) for found in self._shard(shard)), start, None)

    def fingerprint(self) -> str:
        """Return what changes when shards are added or removed, or the columns change; what is in them is not known."""
        return fingerprint_of([self.shards, self.rows.features])

    def _shard(self, shard: int) -> Iterator[NamedRecord]:
        number, name = 0, f"{self.data.path}, shard {shard}"
        try:
            for number, row in enumerate(self.rows.shard(self.shards, shard)):
                own = f"{name}, record {number}"
                try:
                    found: Record | BadSample = record_of(row, own, self.data)
                except BadSample as reason:
                    found = reason
                yield own, found
        except Exception as error:  # damaged files raise what their format raises
            yield f"{name} after record {number}", BadSample(f"the rest of it cannot be read: {error or type(error).__name__}")


def record_of(row: Mapping[str, Any], name: str, data: DatasetData) -> Record:
    """Make a row's record.

    Raises:
        BadSample: it lacks an image or a caption.
    """
    images = [key for key in ([data.image] if data.image else _IMAGE_KEYS) if row.get(key) is not None]
    if not images:
        raise BadSample(f"it has no {data.image or ' or '.join(_IMAGE_KEYS)}, but {', '.join(row)}; set data.image")
    image = row[images[0]]
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else Path(image.get("path") or "")
    return Record(name, image, captions_in(_captions(row), data.caption))


def _captions(row: Mapping[str, Any]) -> dict[str, Any]:
    """Collect a row's fields, those within `json` and the text of `txt` among them."""
    nested = row.get("json")
    fields = {**(nested if isinstance(nested, Mapping) else {}), **row}
    if not any(key in fields for key in CAPTION_KEYS) and "txt" in fields:
        fields["caption"] = fields["txt"]
    return fields
