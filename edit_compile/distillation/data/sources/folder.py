"""A folder of pictures, captions in a `metadata.jsonl` or in a `.txt` file beside each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edit_compile.distillation.data.records import PICTURE_SUFFIXES, Record, Unreadable, caption_in, decoded_text
from edit_compile.errors import DistillError

METADATA = "metadata.jsonl"


class Folder:
    """The captioned pictures of a folder and all below it, in the order of their paths.

    A folder's `metadata.jsonl` holds a line for each picture: `{"file_name": "a.jpg", "caption": "..."}`, as the
    `imagefolder` of `datasets` reads it. A picture that no line names has its caption in a file beside it, `a.txt`.
    """

    def __init__(self, path: Path, caption: str | None, skipped: dict[str, str]) -> None:
        """
        Args:
            caption: the key of the captions in `metadata.jsonl`; None for caption, text or prompt.
            skipped: lines that cannot be read are added here.

        Raises:
            DistillError: it is no folder, or holds no pictures.
        """
        if not path.is_dir():
            raise DistillError(f"data.path: {path} is {'no folder' if path.exists() else 'not there'}")
        self.path, self.caption = path, caption
        self.fields = dict(self._metadata(skipped))
        found = {file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()}
        self.files = sorted(found | self.fields.keys())
        if not self.files:
            raise DistillError(f"data.path: {path} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def record(self, index: int) -> Record:
        """The picture's record.

        Raises:
            Unreadable: it has no caption.
        """
        file = self.files[index]
        if file in self.fields:
            return Record(str(file), file, caption_in(self.fields[file], self.caption))
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            raise Unreadable(f"no line of {METADATA} names it, and there is no {beside.name}")
        return Record(str(file), file, caption_in({"caption": decoded_text(beside.read_bytes())}))

    def _metadata(self, skipped: dict[str, str]) -> Iterator[tuple[Path, dict[str, Any]]]:
        for file in sorted(self.path.rglob(METADATA)):
            for number, line in enumerate(file.read_bytes().splitlines(), 1):
                try:
                    fields = json.loads(line)
                    yield file.parent / fields["file_name"], fields
                except (ValueError, KeyError, TypeError) as error:
                    skipped[f"{file}:{number}"] = f"no JSON object with a file_name: {error}"
