"""Data of kind `dataset`: whatever `datasets` loads, from the hub or from files, at random access or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edit_compile.distillation.data.captioned import CaptionedData
from edit_compile.distillation.data.records import CAPTION_KEYS, Record, Unreadable, caption_in
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.errors import DistillError

_PICTURE_KEYS = ("image", "picture", "jpg", "jpeg", "png", "webp")
_HELD_OUT_SHARDS = 8
Found = tuple[str, Record | Unreadable]


class DatasetData(CaptionedData):
    """A data set of the hub, or any that `datasets.load_dataset` reads.

    Attributes:
        path: as `load_dataset` takes it: a hub id, a folder, or a format such as `imagefolder`, `webdataset` or `parquet`.
        name, split, revision, data_dir, data_files: as `load_dataset` takes them.
        image, caption: the columns. Default: the usual names.
        streaming: read as it is downloaded, and keep nothing. Stages go on where the one before ended by reading up to there.
    """

    kind: Literal["dataset"]
    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    image: str | None = None
    caption: str | None = None
    streaming: bool = False

    def load(self) -> Any:
        """The data set, its pictures not decoded.

        Raises:
            DistillError: it cannot be loaded.
        """
        import datasets

        options = self.model_dump(include={"name", "split", "revision", "data_dir", "data_files", "streaming"}, exclude_none=True)
        try:
            found = datasets.load_dataset(self.path, **options)
        except Exception as error:  # each format raises its own
            raise DistillError(f"data.path: {self.path} cannot be loaded: {error or type(error).__name__}") from error
        if self.streaming:
            return found.decode(False)
        for column, feature in found.features.items():
            if isinstance(feature, datasets.Image):
                found = found.cast_column(column, datasets.Image(decode=False))
        return found

    def corpus(self, skipped: dict[str, str]) -> Rows:
        """The samples, by index."""
        return Rows(self)


class Rows:
    """The rows of a data set."""

    def __init__(self, data: DatasetData) -> None:
        self.data, self.rows = data, data.load()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.data.path}, row {index}"

    def record(self, index: int) -> Record:
        """The row's record.

        Raises:
            Unreadable: it lacks a picture or a caption.
        """
        try:
            row = self.rows[index]
        except Exception as error:  # damaged files raise what their format raises
            raise Unreadable(f"it cannot be read: {error}") from error
        return record_of(row, self.name(index), self.data)


class Stream:
    """A data set read shard by shard. A shard that cannot be read on is named, and the next one begins.

    The first records of the first shards are the held-out ones.
    """

    def __init__(self, data: DatasetData, seed: int, held_out: int) -> None:
        self.data, self.seed, self.rows = data, seed, data.load()
        self.shards = self.rows.num_shards
        self.kept_back = -(-held_out // min(self.shards, _HELD_OUT_SHARDS))

    def held_out(self) -> Iterator[Found]:
        """Those that are never trained on."""
        for shard in range(min(self.shards, _HELD_OUT_SHARDS)):
            yield from islice(self._shard(shard), self.kept_back)

    def epoch(self, number: int) -> Iterator[Found]:
        """All others, the shards shuffled."""
        for shard in np.random.default_rng(seed_of(self.seed, "shards", number)).permutation(self.shards):
            yield from islice(self._shard(int(shard)), self.kept_back if shard < _HELD_OUT_SHARDS else 0, None)

    def records(self, start: int) -> Iterator[Found]:
        """All, in order, from a number on."""
        return islice((found for shard in range(self.shards) for found in self._shard(shard)), start, None)

    def _shard(self, shard: int) -> Iterator[Found]:
        number, name = 0, f"{self.data.path}, shard {shard}"
        try:
            for number, row in enumerate(self.rows.shard(self.shards, shard)):
                own = f"{name}, record {number}"
                try:
                    found: Record | Unreadable = record_of(row, own, self.data)
                except Unreadable as reason:
                    found = reason
                yield own, found
        except Exception as error:  # damaged files raise what their format raises
            yield f"{name} after record {number}", Unreadable(f"it cannot be read on: {error or type(error).__name__}")


def record_of(row: Mapping[str, Any], name: str, data: DatasetData) -> Record:
    """A row's record.

    Raises:
        Unreadable: it lacks a picture or a caption.
    """
    pictures = [key for key in ([data.image] if data.image else _PICTURE_KEYS) if row.get(key) is not None]
    if not pictures:
        raise Unreadable(f"it has no {data.image or ' or '.join(_PICTURE_KEYS)}, but {', '.join(row)}; set data.image")
    picture = row[pictures[0]]
    if isinstance(picture, Mapping):
        picture = picture["bytes"] if picture.get("bytes") is not None else Path(picture.get("path") or "")
    return Record(name, picture, caption_in(_captions(row), data.caption))


def _captions(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's fields, those within `json` and the text of `txt` among them."""
    nested = row.get("json")
    fields = {**(nested if isinstance(nested, Mapping) else {}), **row}
    if not any(key in fields for key in CAPTION_KEYS) and "txt" in fields:
        fields["caption"] = fields["txt"]
    return fields
