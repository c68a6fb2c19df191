"""Data of kind `webdataset`: tar files of pictures and captions, read at any place without unpacking."""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edit_compile.distillation.data.captioned import CaptionedData
from edit_compile.distillation.data.records import PICTURE_SUFFIXES, Record, Unreadable, caption_in, decoded_text, some_of
from edit_compile.errors import DistillError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarData(CaptionedData):
    """WebDataset shards on a disk; remote ones are for kind `dataset` with `path: webdataset` and `streaming: true`.

    Attributes:
        path: of the tar files; `*` and `{000..123}` stand for many.
        caption: the ending of the captions' files, and for JSON the key: `txt`, or `json.prompt`. Default: `txt`, else
            caption, text or prompt in `json`.
    """

    kind: Literal["webdataset"]
    path: str
    caption: str | None = None

    def corpus(self, skipped: dict[str, str]) -> TarShards:
        """The samples, by index; shards that cannot be read are added to `skipped`."""
        return TarShards(self.path, self.caption, skipped)


@dataclass
class _Member:
    """A sample: where each of its files is in the shard, (offset, bytes) by ending."""

    shard: Path
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


class TarShards:
    """The samples of all shards, in order. The shards' tables of contents are read at once, files when they are asked for."""

    def __init__(self, pattern: str, caption: str | None, skipped: dict[str, str]) -> None:
        """
        Raises:
            DistillError: there are no shards, or no samples in them.
        """
        self.caption = caption
        shards = [Path(file) for each in _expanded(pattern) for file in sorted(glob.glob(each))]  # noqa: PTH207 - the pattern may be absolute
        if not shards:
            raise DistillError(f"data.path: there are no files {pattern}")
        self.members = [member for shard in shards for member in _contents(shard, skipped)]
        if not self.members:
            raise DistillError(f"data.path: there are no pictures in {pattern}; {some_of(skipped)}")

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.members[index].shard}:{self.members[index].key}"

    def record(self, index: int) -> Record:
        """The sample's record.

        Raises:
            Unreadable: it has no caption, or its bytes are not there.
        """
        member = self.members[index]
        picture = next(ending for ending in member.parts if f".{ending}" in PICTURE_SUFFIXES)
        return Record(self.name(index), _read(member, picture), self._caption(member))

    def _caption(self, member: _Member) -> str:
        ending, _, key = (self.caption or ("txt" if "txt" in member.parts else "json")).partition(".")
        text = decoded_text(_read(member, ending))
        if ending != "json":
            return caption_in({"caption": text})
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise Unreadable(f"its json is none: {error}") from error
        return caption_in(fields if isinstance(fields, dict) else {"json": fields}, key or None)


def _expanded(pattern: str) -> Iterator[str]:
    """The patterns that a range of numbers in braces stands for."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")


def _contents(shard: Path, skipped: dict[str, str]) -> list[_Member]:
    """The samples of a shard that have a picture. Of a shard that breaks off, those before."""
    members: dict[str, _Member] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            while (file := tar.next()) is not None:
                folder, _, name = file.name.rpartition("/")
                key, _, ending = name.partition(".")
                if file.isfile() and key:
                    whole = f"{folder}/{key}" if folder else key
                    members.setdefault(whole, _Member(shard, whole)).parts[ending.lower()] = (file.offset_data, file.size)
    except (tarfile.TarError, OSError) as error:
        skipped[str(shard)] = f"it cannot be read{f' after {len(members)} samples' if members else ''}: {error}"
    return [member for member in members.values() if any(f".{ending}" in PICTURE_SUFFIXES for ending in member.parts)]


def _read(member: _Member, ending: str) -> bytes:
    if ending not in member.parts:
        raise Unreadable(f"it has no {ending}, but {', '.join(member.parts)}")
    offset, size = member.parts[ending]
    try:
        with member.shard.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise Unreadable(f"its shard cannot be read: {error}") from error
    if len(content) != size:
        raise Unreadable(f"its {ending} breaks off: the shard is truncated")
    return content
