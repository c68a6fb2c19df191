"""Data of kind `webdataset`: tar files of images and captions, read in place without unpacking."""

from __future__ import annotations

import glob
import io
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from torch import nn

from edit_compile.distillation.data.captioned_images import CaptionedImages
from edit_compile.distillation.data.decode_image import IMAGE_SUFFIXES, MAX_BYTES, looks_like_image
from edit_compile.distillation.data.records import (
    BadSample,
    Record,
    captions_in,
    check_usable,
    decoded_object,
    decoded_text,
    fingerprint_of,
    printable,
    summarize,
)
from edit_compile.distillation.data.registry import register_data
from edit_compile.errors import DistillError

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_SHARDS = 100_000
_MAX_CAPTION_FILE, _MAX_HEADER = 2**24, 2**20  # bytes


@register_data("webdataset")
class WebDatasetData(CaptionedImages):
    """WebDataset shards on disk; remote ones are for kind `dataset` with `path: webdataset` and `streaming: true`."""

    kind: Literal["webdataset"]
    path: str
    """Of the tar files; `*` and `{000..123}` stand for many."""
    caption: str | None = None
    """The ending of the captions' files, and for JSON the key: `txt`, or `json.prompt`. Default: `txt`, else caption, text or
    prompt in `json`."""

    def check_files(self, model: nn.Module) -> None:
        """Find an image with a caption, in the first shard that has one."""
        skipped: dict[str, str] = {}
        samples = (sample for shard in _shards(self.path) for sample in _contents(shard, skipped))
        check_usable(((sample.name, _record_or_reason(sample, self.caption)) for sample in samples), self.path, skipped)

    def records(self, skipped: dict[str, str]) -> TarShards:
        """Open the shards; those that cannot be read are added to `skipped`."""
        return TarShards(self.path, self.caption, skipped)


@dataclass
class _Sample:
    """Where each of a sample's files is in its shard, as (offset, bytes) by ending."""

    shard: Path
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return printable(f"{self.shard}:{self.key}")

    @property
    def image(self) -> str | None:
        """The ending of its image."""
        return next((ending for ending in self.parts if f".{ending}" in IMAGE_SUFFIXES), None)


class TarShards:
    """The samples of all shards, in order. The tables of contents are read when it is opened, the files when they are asked for."""

    def __init__(self, pattern: str, caption: str | None, skipped: dict[str, str]) -> None:
        """
        Raises:
            DistillError: there are no shards, or no samples in them.
        """
        self.caption = caption
        self.samples = [sample for shard in _shards(pattern) for sample in _contents(shard, skipped)]
        if not self.samples:
            raise DistillError(f"data.path: there are no images in {pattern}; {summarize(skipped)}")

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index].name

    def record(self, index: int) -> Record:
        """Return a sample's record.

        Raises:
            BadSample: it has no caption, or its bytes are missing.
        """
        return _record(self.samples[index], self.caption)

    def fingerprint(self) -> str:
        return fingerprint_of((sample.shard.name, sample.key, sorted(sample.parts.items())) for sample in self.samples)


def _record(sample: _Sample, caption: str | None) -> Record:
    return Record(sample.name, _read(sample, sample.image or "", MAX_BYTES), _captions(sample, caption))


def _record_or_reason(sample: _Sample, caption: str | None) -> Record | BadSample:
    try:
        return _record(sample, caption)
    except BadSample as reason:
        return reason


def _captions(sample: _Sample, caption: str | None) -> tuple[str, ...]:
    ending, _, key = (caption or ("txt" if "txt" in sample.parts else "json")).partition(".")
    content = _read(sample, ending, _MAX_CAPTION_FILE)
    if ending != "json":
        return captions_in({"caption": decoded_text(content)})
    return captions_in(decoded_object(content), key or None)


def _shards(pattern: str) -> list[Path]:
    patterns = list(islice(_expanded(pattern), _MAX_SHARDS + 1))
    if len(patterns) > _MAX_SHARDS:
        raise DistillError(f"data.path: {pattern} stands for more than {_MAX_SHARDS:,} files; * stands for those that there are")
    named = ([each] if Path(each).exists() else sorted(glob.glob(each)) for each in patterns)  # noqa: PTH207 - the pattern may be absolute
    found = [Path(file) for files in named for file in files]
    if not found:
        raise DistillError(f"data.path: no files match {pattern}")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """Expand the ranges of numbers in braces."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")


def _contents(shard: Path, skipped: dict[str, str]) -> list[_Sample]:
    """List the samples of a shard that have an image; others are added to `skipped`. If the shard is cut off, those before its end."""
    samples: dict[str, _Sample] = {}
    for name, place in _regular_files(shard, skipped).items():
        folder, slash, file = name.rpartition("/")
        key, _, ending = file.partition(".")
        samples.setdefault(folder + slash + key, _Sample(shard, folder + slash + key)).parts[ending.lower()] = place
    for sample in list(samples.values()):
        _separate(sample, samples)
    for sample in samples.values():
        if sample.image is None:
            skipped[printable(f"{shard}:{sample.key}")] = (
                f"it has {printable(', '.join(sample.parts))}, but no image of a kind that is read"
            )
    return [sample for sample in samples.values() if sample.image is not None]


def _separate(sample: _Sample, samples: dict[str, _Sample]) -> None:
    """Make samples of their own of a sample's files whose names differ before their last dot: `a.final.png`, `a.final.txt`.

    By WebDataset's convention a name's key ends at its first dot, and `a.depth.png` is a part of sample `a`. It stays one where
    nothing but its last ending would be `a.depth`'s.
    """
    longer: dict[str, dict[str, tuple[int, int]]] = {}
    for ending, place in sample.parts.items():
        more, dot, last = ending.rpartition(".")
        if dot:
            longer.setdefault(more, {})[last] = place
    for more, parts in longer.items():
        own = _Sample(sample.shard, f"{sample.key}.{more}", parts)
        if own.image is not None and len(parts) > 1:
            samples[own.key] = own
            for ending in parts:
                del sample.parts[f"{more}.{ending}"]
    if not sample.parts:
        del samples[sample.key]


class _Headers(io.BufferedReader):
    """A tar file of which the headers alone are read, whatever lengths they claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    before = -1
    with _Headers(io.FileIO(shard)) as content, tarfile.open(fileobj=content, mode="r:") as tar:
        while (file := tar.next()) is not None:
            if file.offset <= before:  # what claims a negative size leads back, round and round
                raise tarfile.ReadError("a file begins before the one before it")
            before = file.offset
            yield file


def _regular_files(shard: Path, skipped: dict[str, str]) -> dict[str, tuple[int, int]]:
    """List the files of a shard by name, as (offset, bytes); links are what they lead to in the shard."""
    places: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        if not shard.is_file():
            raise OSError("it is not a regular file")
        for file in _members(shard):
            if file.issym() or file.islnk():
                links[file.name] = file.linkname if file.islnk() else posixpath.join(posixpath.dirname(file.name), file.linkname)
            elif file.isfile() and not file.issparse() and not posixpath.basename(file.name).startswith("."):
                places[file.name] = (file.offset_data, file.size)
            elif looks_like_image(file.name):
                skipped[printable(f"{shard}:{file.name}")] = "it is hidden, or not a regular file"
    except Exception as error:  # the reader of headers runs into whatever a damaged one holds
        skipped[printable(shard)] = f"it cannot be read{f' after {len(places)} files' if places else ''}: {error}"
    for name, target in links.items():
        place = places.get(posixpath.normpath(target))
        if place is not None:
            places[name] = place
        elif looks_like_image(name):
            skipped[printable(f"{shard}:{name}")] = f"it is a link to {printable(target)}, which is no file of the shard"
    return places


def _read(sample: _Sample, ending: str, most: int) -> bytes:
    if ending not in sample.parts:
        raise BadSample(f"it has no {ending}, but {', '.join(sample.parts)}")
    offset, size = sample.parts[ending]
    if not 0 <= size <= most:
        raise BadSample(f"its {ending} has {size:,} bytes, more than {most:,}" if size > 0 else f"its {ending} has a negative size")
    try:
        with sample.shard.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise BadSample(f"its shard cannot be read: {error}") from error
    if len(content) != size:
        raise BadSample(f"its {ending} is cut off: the shard is truncated")
    return content
