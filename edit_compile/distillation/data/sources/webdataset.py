"""Data of kind `webdataset`: tar files of images and captions, read in place without unpacking."""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edit_compile.distillation.data.captioned_images import CaptionedImages
from edit_compile.distillation.data.records import IMAGE_SUFFIXES, BadSample, Record, caption_in, decoded_text, summarize
from edit_compile.distillation.data.registry import register_data
from edit_compile.errors import DistillError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@register_data("webdataset")
class WebDatasetData(CaptionedImages):
    """WebDataset shards on disk; remote ones are for kind `dataset` with `path: webdataset` and `streaming: true`."""

    kind: Literal["webdataset"]
    path: str
    """Of the tar files; `*` and `{000..123}` stand for many."""
    caption: str | None = None
    """The ending of the captions' files, and for JSON the key: `txt`, or `json.prompt`. Default: `txt`, else caption, text or
    prompt in `json`."""

    def records(self, skipped: dict[str, str]) -> TarShards:
        """Open the shards; those that cannot be read are added to `skipped`."""
        return TarShards(self.path, self.caption, skipped)


@dataclass
class _Member:
    """A sample: where each of its files is in the shard, as (offset, bytes) by ending."""

    shard: Path
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


class TarShards:
    """The samples of all shards, in order. The tables of contents are read when it is opened, the files when they are asked for."""

    def __init__(self, pattern: str, caption: str | None, skipped: dict[str, str]) -> None:
        """
        Raises:
            DistillError: there are no shards, or no samples in them.
        """
        self.caption = caption
        shards = [Path(file) for each in _expanded(pattern) for file in sorted(glob.glob(each))]  # noqa: PTH207 - the pattern may be absolute
        if not shards:
            raise DistillError(f"data.path: no files match {pattern}")
        self.members = [member for shard in shards for member in _contents(shard, skipped)]
        if not self.members:
            raise DistillError(f"data.path: there are no images in {pattern}; {summarize(skipped)}")

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.members[index].shard}:{self.members[index].key}"

    def record(self, index: int) -> Record:
        """Return a sample's record.

        Raises:
            BadSample: it has no caption, or its bytes are missing.
        """
        member = self.members[index]
        image = next(ending for ending in member.parts if f".{ending}" in IMAGE_SUFFIXES)
        return Record(self.name(index), _read(member, image), self._caption(member))

    def _caption(self, member: _Member) -> str:
        ending, _, key = (self.caption or ("txt" if "txt" in member.parts else "json")).partition(".")
        text = decoded_text(_read(member, ending))
        if ending != "json":
            return caption_in({"caption": text})
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise BadSample(f"its json is not valid JSON: {error}") from error
        return caption_in(fields if isinstance(fields, dict) else {"json": fields}, key or None)


def _expanded(pattern: str) -> Iterator[str]:
    """Expand the ranges of numbers in braces."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")


def _contents(shard: Path, skipped: dict[str, str]) -> list[_Member]:
    """List the samples of a shard that have an image. If the shard is cut off, those before the end."""
    members: dict[str, _Member] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            while (file := tar.next()) is not None:
                folder, _, name = file.name.rpartition("/")
                key, _, ending = name.partition(".")
                if file.isfile() and key:
                    path = f"{folder}/{key}" if folder else key
                    members.setdefault(path, _Member(shard, path)).parts[ending.lower()] = (file.offset_data, file.size)
    except (tarfile.TarError, OSError) as error:
        skipped[str(shard)] = f"it cannot be read{f' after {len(members)} samples' if members else ''}: {error}"
    return [member for member in members.values() if any(f".{ending}" in IMAGE_SUFFIXES for ending in member.parts)]


def _read(member: _Member, ending: str) -> bytes:
    if ending not in member.parts:
        raise BadSample(f"it has no {ending}, but {', '.join(member.parts)}")
    offset, size = member.parts[ending]
    try:
        with member.shard.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise BadSample(f"its shard cannot be read: {error}") from error
    if len(content) != size:
        raise BadSample(f"its {ending} is cut off: the shard is truncated")
    return content
